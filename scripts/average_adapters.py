"""Average adapters of one training: the mean of an early and a late one may be better than either.

    python scripts/average_adapters.py early.safetensors late.safetensors --weights 1,1 --out adapter.safetensors

On the straight line between two models of one fine-tuning, what the one can do is traded for what the other can
(WiSE-FT, arXiv 2109.01903; model soups, arXiv 2203.05482). This holds for adapters of which one was trained from the
other (``train_adapter.py --start``); the mean of two that began apart is neither. The two factors of LoRA are averaged
each by itself, which is near the average of their products for such adapters only.
"""

from pathlib import Path

import click

from ddit.runtime.console import DditCommand, say
from ddit.runtime.errors import AdapterError, UsageError
from ddit.runtime.files import whole

try:
    import torch

    from ddit.exporter.adapter import Adapter, load_adapter
except ModuleNotFoundError as error:
    raise SystemExit(f"error: {error.name} is not installed: pip install 'ddit[export]'") from None


@click.command(cls=DditCommand, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("adapters", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--weights", help="A number for each adapter, as in 1,3.  [default: all alike]")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The adapter to write.")
def main(adapters: tuple[Path, ...], weights: str | None, out: Path) -> None:
    """Average the weights of adapters that come from one training."""
    with whole(out) as part:  # never into a file that is still mapped
        mean = average([load_adapter(path) for path in adapters], read_weights(weights, len(adapters)), part)
        mean.save()
    say(f"{out}: the mean of {len(adapters)} adapters, levels {', '.join(map(str, mean.configs))}")


def read_weights(text: str | None, count: int) -> list[float]:
    """Each adapter's share; they add up to 1. Raises `UsageError`."""
    try:
        numbers = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        raise UsageError(f"cannot read the weights {text!r}; write numbers, as in 1,3") from None
    if len(numbers) != count:
        raise UsageError(f"{len(numbers)} weights for {count} adapters; give each adapter one")
    if not all(0 <= number < float("inf") for number in numbers) or not sum(numbers):
        raise UsageError(f"weights must be 0 or more and not all 0, not {text}")
    return [number / sum(numbers) for number in numbers]


def average(adapters: list[Adapter], weights: list[float], path: Path) -> Adapter:
    """The weighted mean, computed in float32 and kept in the first one's dtype. Raises `AdapterError`."""
    first = adapters[0]
    for other in adapters[1:]:
        same = first.configs == other.configs and first.family == other.family
        if not same or shapes(first) != shapes(other):
            raise AdapterError(f"{other.path} and {first.path} differ in levels or parts; only equal ones have a mean")
    shares = torch.tensor(weights)
    tensors = {}
    for name, tensor in first.tensors.items():
        values = torch.stack([one.tensors[name].float() for one in adapters], dim=-1)
        tensors[name] = (values @ shares).to(tensor.dtype)
    return Adapter(path, first.base_model, first.family, first.configs, tensors)


def shapes(adapter: Adapter) -> dict[str, torch.Size]:
    """Every tensor's shape."""
    return {name: tensor.shape for name, tensor in adapter.tensors.items()}


if __name__ == "__main__":
    main()
