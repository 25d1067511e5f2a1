"""llama.cpp's converter, a little more lenient. Run as a script; imports nothing of depthprune.

    python run_converter.py PATH/convert_hf_to_gguf.py [--without-vocabulary] FOLDER --outfile FILE --outtype f32

The converter knows the splitting rules of byte-level tokenizers by a hash of what they make of one text, and refuses
those that it has not seen. Here they are named ``unproven``, which no llama.cpp loads: whoever runs this has to put the
name of the right rule in its place. ``--without-vocabulary`` is for models that have no tokenizer.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

UNPROVEN = "unproven"


def main() -> None:
    """Load the converter, change what is said above, and run it on the other arguments."""
    script, *rest = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    spec = importlib.util.spec_from_file_location("convert_hf_to_gguf", script)
    assert spec is not None and spec.loader is not None
    converter = sys.modules["convert_hf_to_gguf"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    home: Any = sys.modules.get("conversion.base", converter)  # older checkouts are one file
    lenient(home.TextModel)
    if "--without-vocabulary" in rest:
        rest.remove("--without-vocabulary")
        home.TextModel.write = silent(home.TextModel.write)
    sys.argv = [script, *rest]
    converter.main()


def lenient(kind: Any) -> None:
    """Let tokenizers through that the converter does not know; ask for sentencepiece only where it is needed."""
    known, pieces = kind.get_vocab_base_pre, kind._create_vocab_sentencepiece

    def get_vocab_base_pre(self: Any, tokenizer: Any) -> Any:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return UNPROVEN

    def create_vocab_sentencepiece(self: Any, *given: Any) -> Any:
        if not (self.dir_model / "tokenizer.model").is_file():
            raise FileNotFoundError("no tokenizer.model")  # the families go on to tokenizer.json
        if importlib.util.find_spec("sentencepiece") is None:
            raise SystemExit("its tokenizer.model can only be read by sentencepiece: pip install sentencepiece")
        return pieces(self, *given)

    kind.get_vocab_base_pre = get_vocab_base_pre
    kind._create_vocab_sentencepiece = create_vocab_sentencepiece


def silent(write: Any) -> Any:
    """Write a model without a vocabulary; only its size is said."""

    def set_vocab(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    def write_it(self: Any) -> None:
        type(self).set_vocab = set_vocab
        write(self)

    return write_it


if __name__ == "__main__":
    main()
