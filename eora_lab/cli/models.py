"""`eora-lab models`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Models:
    """List the models that need no hub, and how to name any other."""

    def run(self) -> None:
        from eora_lab.model.load import EMBEDDED

        for name, description in EMBEDDED.items():
            print(f"{name:16} {description}")
        print(f"{'OWNER/NAME':16} a decoder-only model of the Hugging Face hub, from its safetensors")
        print(f"{'FOLDER':16} a local folder with config.json, safetensors and tokenizer files, or a .gguf file")
