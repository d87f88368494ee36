"""A module of three lines beside the weights, by which transformers finds our classes where nobody imported them."""

import json
from pathlib import Path

STUB = "modeling_transect"

_AUTO = {
    "TransectModel": "AutoModel",
    "TransectForCausalLM": "AutoModelForCausalLM",
    "TransectForMaskedLM": "AutoModelForMaskedLM",
    "TransectForSequenceClassification": "AutoModelForSequenceClassification",
    "TransectForMultipleChoice": "AutoModelForMultipleChoice",
}


def write_stub(folder: Path, name: str) -> None:
    """Write the module into a saved model's folder, and its place into config.json; `name` is the model's class.

    It holds no code of ours: `trust_remote_code=True` imports the installed package.
    """
    lines = [
        '"""The code of this model is the package transect; it must be installed."""',
        "",
        f"from transect.models import TransectConfig as TransectConfig, {name} as {name}",
    ]
    (folder / f"{STUB}.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    classes = {"AutoConfig": "TransectConfig", _AUTO[name]: name}
    config["auto_map"] = {auto: f"{STUB}.{kind}" for auto, kind in classes.items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
