"""What all exports share: model folders that stock libraries load, with their cards."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENIZER = "PreTrainedTokenizerFast"  # the class name that transformers 4 and 5 share


def load_average(model: nn.Module, weights: Path | None) -> int:
    """Loads the averaged weights of a training, if any, and readies the model for use.

    Returns:
        The number of steps that they were trained, 0 where that is not known.
    """
    model.eval()
    if weights is None:
        return 0
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(state.get("average", state))
    return state.get("step", 0)


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Saves a pipeline with fp16 weights that load as fp32 unless a dtype is asked for.

    The models of the pipeline are in half precision afterwards.

    Args:
        pipe: Its text encoders are called `text_encoder…`, its tokenizers `tokenizer…`.
        folder: Where it goes; files of an earlier export are replaced.
    """
    pipe.vae.register_to_config(_name_or_path="")  # else the folder names a path of this machine
    pipe.to(torch.float16).save_pretrained(folder)
    tokenizers = [name for name in pipe.components if name.startswith("tokenizer")]
    for name in tokenizers:
        name_tokenizer(folder / name)
    edit_json(
        folder / "model_index.json", {name: ["transformers", TOKENIZER] for name in tokenizers}
    )
    for name in pipe.components:
        if name.startswith("text_encoder"):
            edit_json(folder / name / "config.json", {"dtype": "float32"})
    open_to_all(folder)


def name_tokenizer(folder: Path) -> None:
    """Names the class of a saved tokenizer as all versions of transformers do."""
    edit_json(folder / "tokenizer_config.json", {"tokenizer_class": TOKENIZER})


def open_to_all(folder: Path) -> None:
    """Lets everybody read the weights in a folder."""
    for weights in folder.rglob("*.safetensors"):
        weights.chmod(0o644)


def edit_json(path: Path, changes: dict[str, Any]) -> None:
    """Changes entries of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_card(folder: Path, template: Path, values: dict[str, object]) -> None:
    """Fills the fields of a template and writes it as README.md into a folder."""
    (folder / "README.md").write_text(template.read_text().format(**values))


def in_millions(module: nn.Module) -> str:
    """Number of parameters, such as "2.1 M"."""
    return f"{sum(weight.numel() for weight in module.parameters()) / 1e6:.1f} M"
