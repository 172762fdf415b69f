"""Train the classifier that judges the demo's pictures, on scenes drawn on the fly.

    python scripts/train_scene_classifier.py --seconds 1200

Without --out it replaces the weights that `demo_model.classifier` loads.
"""

from pathlib import Path

import click
import torch

from demo_model.classifier import WEIGHTS, train


@click.command()
@click.option("--seconds", default=1200.0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=WEIGHTS, help="Where to write the weights.")
def main(seconds: float, out: Path) -> None:
    """Train the classifier."""
    torch.manual_seed(0)
    train(seconds, device="cuda" if torch.cuda.is_available() else "cpu").save(out)


if __name__ == "__main__":
    main()
