"""docs/spec/ in plain NumPy: a second host, which uses nothing of the runtime's. What the runtime is compared with."""

import json
import math
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from scipy.fft import dctn, idctn

F32 = np.float32
Size = tuple[int, ...]  # (H, W) in latent pixels, of a clip (F, H, W)


# --- sampling.md -----------------------------------------------------------------------------------------------------


def latent_size(manifest: dict, height: int, width: int, frames: int | None = None) -> Size:
    size = []
    for axis in manifest["latent"]["axes"]:
        if axis["name"] == "frames":
            assert (frames - 1) % axis["downscale"] == 0
            size.append((frames - 1) // axis["downscale"] + 1)
        else:
            size.append({"height": height, "width": width}[axis["name"]] // axis["downscale"])
    return tuple(size)


def grid(size: Size, patch: int) -> Size:
    """Patches along the axes; frames are not cut."""
    return (*size[:-2], size[-2] // patch, size[-1] // patch)


def scaled_size(manifest: dict, size: Size, scale: Fraction) -> Size:
    if scale == 1:
        return size
    unit = math.lcm(*(level["patch"] for level in manifest["levels"]))

    def nearest(side: int) -> int:
        wanted = round(side * scale)  # a half to the even number
        candidates = sorted({max(1, wanted // unit), wanted // unit + 1}, key=lambda n: (abs(n * unit - wanted), n))
        return candidates[0] * unit

    return (*size[:-2], *map(nearest, size[-2:]))


def noise_levels(manifest: dict, steps: int, size: Size) -> np.ndarray:
    return exact_levels(manifest, steps, size).astype(F32)


def exact_levels(manifest: dict, steps: int, size: Size) -> np.ndarray:
    """The noise levels in float64."""
    sampler = manifest["sampler"]
    if sampler["kind"] == "flow_unipc":
        return unipc_levels(sampler["shift"], sampler["train_steps"], steps)
    last = sampler.get("smallest") or 1 / steps
    even = [1 + i * (last - 1) / (steps - 1) if i < steps - 1 else last for i in range(steps)] if steps > 1 else [1.0]
    u = np.array(even).astype(F32).astype(np.float64)
    tokens = math.prod(grid(size, manifest["native"]))
    slope = (sampler["max_shift"] - sampler["base_shift"]) / (
        sampler["max_image_seq_len"] - sampler["base_image_seq_len"]
    )
    mu = sampler["base_shift"] + (tokens - sampler["base_image_seq_len"]) * slope
    s = math.exp(mu) if sampler["use_dynamic_shifting"] else sampler["shift"]
    return np.append(s * u / (1 + (s - 1) * u), 0)


def told(manifest: dict, sigma: float) -> float:
    """The `timestep` of levels and the gate."""
    sampler = manifest["sampler"]
    if sampler["kind"] != "flow_unipc":
        return sigma
    return math.floor(sigma * sampler["train_steps"]) / sampler["train_steps"]


def unipc_levels(shift: float, train_steps: int, steps: int) -> np.ndarray:
    u = np.array([i * ((1 / train_steps - 1) / steps) + 1 for i in range(steps)])
    levels = shift * u / (1 + (shift - 1) * u)
    return np.append([min(levels[0], 1 - 1e-6), *levels[1:]], 0)


def unipc_solver(sigmas: np.ndarray, i: int, first: int, q: int) -> list[float]:
    steps, b = len(sigmas) - 1, [0.0] * (q + 1)

    def lam(sigma: float) -> float:
        return math.log((1 - sigma) / sigma) if sigma > 0 else math.inf

    def order(j: int) -> int:
        return min(q, j - first + 1, steps - j)

    a = sigmas[i + 1] / sigmas[i]
    b[0] += 1 - a
    if i > first:
        now, before = sigmas[i], sigmas[i - 1]
        h = lam(now) - lam(before)
        c = -(1 - now) * (math.exp(-h) - 1)
        if order(i - 1) == 1:
            b[0] += a * c / 2
            b[1] -= a * c / 2
        else:
            r = (lam(sigmas[i - 2]) - lam(before)) / h
            phi2 = (math.exp(-h) - 1) / -h - 1
            phi3 = phi2 / -h - 0.5
            one, two = phi2 / (math.exp(-h) - 1), 2 * phi3 / (math.exp(-h) - 1)
            x = (two - one) / (r - 1)
            y = one - x
            x = (x - 0.5) / r
            b[0] += a * c * y
            b[1] -= a * c * (y + x)
            b[2] += a * c * x
    if order(i) == 2:
        h = lam(sigmas[i + 1]) - lam(sigmas[i])
        r = (lam(sigmas[i - 1]) - lam(sigmas[i])) / h
        g = -(1 - sigmas[i + 1]) * (math.exp(-h) - 1) / (2 * r)
        b[0] -= g
        b[1] += g
    return b


def position_tables(manifest: dict, patch: int, size: Size) -> dict[str, np.ndarray]:
    ratio, patches = patch / manifest["native"], grid(size, patch)
    angles = np.empty((*patches, sum(axis["dimensions"] for axis in manifest["positions"]["axes"])))
    names = [axis["name"] for axis in manifest["latent"]["axes"]]
    at = 0
    for axis in manifest["positions"]["axes"]:
        for k in range(axis["dimensions"] // 2):
            frequency = manifest["positions"]["theta"] ** (-2 * k / axis["dimensions"])
            for place in np.ndindex(patches):
                i = place[names.index(axis["axis"])] if axis["axis"] else 0
                coordinate = (i + 0.5) * ratio - 0.5 if axis["axis"] in ("height", "width") else i
                angles[(*place, slice(at, at + 2))] = coordinate * frequency
            at += 2
    return {"rope_cos": np.cos(angles).astype(F32), "rope_sin": np.sin(angles).astype(F32)}


def dct(values: np.ndarray) -> np.ndarray:
    """The orthonormal DCT-II of the last two axes, by SciPy."""
    return dctn(values.astype(np.float64), type=2, norm="ortho", axes=(-2, -1))


def dct_table(size: int) -> np.ndarray:
    return dctn(np.eye(size), type=2, norm="ortho", axes=0)


def in_corner(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    padded = np.zeros(shape, F32)
    padded[tuple(slice(0, side) for side in values.shape)] = values
    return padded


def growing_tables(small: tuple[int, int], large: tuple[int, int]) -> dict[str, np.ndarray]:
    fresh = np.ones(large, F32)
    fresh[: small[0], : small[1]] = 0
    return {
        "dct_small_height": in_corner(dct_table(small[0]), (large[0], large[0])),
        "dct_small_width": in_corner(dct_table(small[1]), (large[1], large[1])),
        "dct_height": dct_table(large[0]).astype(F32),
        "dct_width": dct_table(large[1]).astype(F32),
        "fresh": fresh,
    }


def picture(image: np.ndarray) -> np.ndarray:
    """(3, height, width) → (height, width, 3)."""
    return np.round((np.clip(image, -1, 1) + F32(1)) * F32(127.5)).transpose(1, 2, 0)


# --- policies.md -----------------------------------------------------------------------------------------------------


@dataclass
class History:
    sigmas: np.ndarray
    first: int = 0
    levels: list[int] = field(default_factory=list)
    computed: list[int] = field(default_factory=list)
    error: float | None = None
    changes: dict[int, tuple[float, float, float]] = field(default_factory=dict)  # by step
    deviations: dict[int, np.ndarray] = field(default_factory=dict)
    scale: Fraction = Fraction(1)

    @property
    def i(self) -> int:
        return self.first + len(self.levels)

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def at_level(self) -> list[int]:
        found = []
        for step in reversed(self.computed):
            if self.levels[step - self.first] != self.levels[-1]:
                break
            found.append(step)
        return found


def settings_of(text: str, first: str) -> dict[str, str]:
    parts = [part for part in text.split(",") if part]
    return dict(part.split("=") if "=" in part else (first, part) for part in parts)


class Levels:
    """native, fixed and dynamic."""

    def __init__(self, text: str, host: "Host"):
        self.kind, _, settings = text.partition(":")
        self.native = host.manifest["native"]
        if self.kind == "fixed":
            runs = [(*map(int, part.split("x")), 1)[:2] for part in settings.split(",")]
            self.list = [level for level, times in runs for _ in range(times)]
        if self.kind == "dynamic":
            info = host.settings("dynamic")
            asked = settings_of(settings, "tau")
            self.tau, self.rho = (float(asked.get(name, info[name])) for name in ("tau", "rho"))
            self.warmup, self.hold = (int(asked.get(name, info.get(name, 3))) for name in ("warmup", "hold"))
            coarsest = int(asked.get("coarsest", info.get("coarsest") or 256))
            self.coarse = [patch for patch in host.coarse if patch <= coarsest]
            smooth = [] if int(asked.get("absolute", 0)) else info.get("smooth", [])
            self.smooth = self.curves(sorted(smooth, key=lambda point: point["sigma"]), host.sigmas)

    def curves(self, points: list[dict], sigmas: np.ndarray) -> dict[int, list[float]]:
        s = sigmas.astype(np.float64)
        lengths = [float(np.mean([s[k] - s[k + 1] for k in range(max(0, j - 2), j + 1)])) for j in range(len(s) - 1)]
        if not points:
            return {patch: [1.0] * len(lengths) for patch in self.coarse}
        known = [point["sigma"] for point in points]
        logarithms = {
            patch: [math.log(max(point["statistic"][str(patch)], 1e-30)) for point in points] for patch in self.coarse
        }
        return {
            patch: [math.exp(np.interp(s[j], known, logarithms[patch])) * lengths[j] ** 3 for j in range(len(lengths))]
            for patch in self.coarse
        }

    def __call__(self, history: History) -> int:
        if self.kind == "native":
            return self.native
        if self.kind == "fixed":
            return self.list[history.i]
        i, levels = history.i, history.levels
        if i < self.warmup or len(levels) < 3 or len(set(levels[-self.hold :])) != 1:
            return levels[-1] if i >= self.warmup and levels else self.native
        under = [
            patch
            for patch in self.coarse
            if quantile(history.deviations[patch], self.rho) < self.tau * self.smooth[patch][i - 1]
        ]
        return max([self.native, *under])


def quantile(values: np.ndarray, rho: float) -> float:
    x = np.sort(values, axis=None).astype(F32)
    place = F32(len(x) - 1) * F32(rho)
    a = int(place)
    f, low, high = place - F32(a), x[a], x[min(a + 1, len(x) - 1)]
    return float(low + (high - low) * f if f < 0.5 else high - (high - low) * (F32(1) - f))


@dataclass
class Found:
    weights: list[float]
    enough: bool = False
    correction: float = 0.0


class Reuse:
    """adaptive, adams, taylorseer, dpcache, teacache and spectralcache."""

    def __init__(self, text: str, host: "Host"):
        self.kind, _, settings = text.partition(":")
        first = {"adaptive": "tolerance", "taylorseer": "interval"}.get(self.kind, "threshold")
        asked = settings_of(settings, first)
        usual: dict[str, Any] = {
            "taylorseer": {"interval": 4, "order": 2, "first": 3},
            "teacache": {"threshold": 0.4},
            "spectralcache": {"threshold": 0.6, "low": 0.8, "high": 1.5, "least": 0.5, "most": 1.5, "longest": 2},
        }.get(self.kind, {})
        if self.kind == "adaptive":
            info = host.settings("adaptive")
            usual = {"tolerance": info.get("tolerance", 0.04), "order": info.get("order", 1)}
        self.o = {name: float(asked.get(name, value)) for name, value in usual.items()}
        self.gate = self.kind in ("teacache", "spectralcache")
        self.polynomial = host.manifest["gate"]["coefficients"] if self.gate else []
        if self.kind == "dpcache":
            (self.path,) = [one["computed"] for one in host.manifest["paths"] if host.is_for(one)]

    def __call__(self, h: History) -> Found | None:
        return getattr(self, "_" + self.kind)(h)

    def _adaptive(self, h: History) -> Found | None:
        s, m, i, q = h.sigmas.astype(np.float64), h.at_level(), h.i, int(self.o["order"])
        if len(m) < q + 1:
            return None
        x = [s[k] for k in m[: q + 1]]
        pi = lambda sigma: math.prod(sigma - node for node in x)  # noqa: E731
        w = [math.prod((s[i] - x[l]) / (x[k] - x[l]) for l in range(q + 1) if l != k) for k in range(q + 1)]  # noqa: E741
        p = [(s[j + 1] - s[j]) * pi(s[j]) for j in range(m[0] + 1, i + 1)]
        c = sum(p[:-1]) / pi(s[i])
        if h.error is None or len(m) < q + 2:
            return Found(w, False, c)
        d = h.error / abs(math.prod(x[0] - s[k] for k in m[1 : q + 2]))
        e = d * sum(map(abs, p)) / (1 - s[i + 1])
        return Found(w, e < self.o["tolerance"] and 1 - s[i + 1] <= 1.6 * (1 - s[m[0]]), c)

    def _adams(self, h: History) -> Found | None:
        if not h.levels:
            return None
        s, i = h.sigmas.astype(np.float64), h.i
        return Found([1.0], False, (s[i + 1] - s[i]) ** 2 / (s[i] - s[i - 1]) / 2)

    def _taylorseer(self, h: History) -> Found | None:
        m = h.at_level()
        if not m:
            return None
        enough = h.i - m[0] < self.o["interval"] and len(h.computed) >= self.o["first"]
        return Found(taylor(m, h.i, int(self.o["order"])), enough)

    def _dpcache(self, h: History) -> Found | None:
        m = h.at_level()
        return Found(taylor(m, h.i, 2), h.i not in self.path) if m else None

    def _accumulated(self, h: History) -> float:
        return sum(float(np.polyval(self.polynomial, h.changes[j][0])) for j in range(h.computed[-1] + 1, h.i + 1))

    def _teacache(self, h: History) -> Found | None:
        if not h.computed:
            return None
        enough = self._accumulated(h) < self.o["threshold"] and self.o["threshold"] > 0 and h.i < h.steps - 1
        return Found([1.0], enough)

    def _spectralcache(self, h: History) -> Found | None:
        if not h.computed:
            return None
        o, (_, low, high) = self.o, h.changes[h.i]
        theta = o["threshold"] * (
            o["least"] + (o["most"] - o["least"]) * (1 - math.cos(2 * math.pi * h.i / h.steps)) / 2
        )
        tests = (
            theta > 0,
            self._accumulated(h) < theta,
            low <= o["low"] * theta,
            high <= o["high"] * theta,
            h.i - 1 - h.computed[-1] < o["longest"],
            h.i < h.steps - 1,
        )
        return Found([1.0], all(tests))


def taylor(steps: list[int], step: int, order: int) -> list[float]:
    """By the recursion on the values themselves: one value at a time is 1 and all others 0."""
    used = steps[: order + 1]

    def value(which: int) -> float:
        f = [1.0 if a == which else 0.0 for a in range(len(used))]
        total = 0.0
        for d in range(len(used)):
            total += f[0] * (step - used[0]) ** d / math.factorial(d)
            f = [(f[a] - f[a + 1]) / (used[a] - used[a + 1]) for a in range(len(f) - 1)]
        return total

    return [value(which) for which in range(len(used))]


@dataclass
class Stage:
    scale: Fraction
    size: Size


class Progressive:
    def __init__(self, text: str, host: "Host"):
        settings = text.partition(":")[2].split(",")
        self.own = "adaptive" in settings
        asked = settings_of(",".join(part for part in settings if part != "adaptive"), "delta")
        self.delta = float(asked.get("delta", 0.05))
        scales = [*map(Fraction, asked.get("scales", "1/2").split("-")), Fraction(1)]
        self.stages = [Stage(scale, scaled_size(host.manifest, host.size, scale)) for scale in scales]
        self.spectrum, self.full = host.manifest["spectrum"], host.size[-2:]

    def stage(self, h: History, estimate: np.ndarray | None) -> Stage:
        """The stage of the next step; ``estimate`` is x̂ where there is one."""
        here = next(n for n, stage in enumerate(self.stages) if stage.scale == h.scale)
        n, i = here, h.i
        while n + 1 < len(self.stages):
            height, width = self.stages[n].size[-2:]
            omega = min(height / self.full[0], width / self.full[1]) * min(self.full) / 2
            power = self.spectrum["amplitude"] * omega ** -self.spectrum["exponent"]
            if self.own and n == here and estimate is not None:
                a, b = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
                edge = (np.sqrt(a**2 + b**2) >= 0.9) & (np.sqrt(a**2 + b**2) < 1)
                power = math.prod(self.full) / (height * width) * np.mean(dct(estimate)[..., edge] ** 2)
            odds = power * (1 + power - self.delta)
            until = 1 / (1 + math.sqrt(self.delta / odds)) if odds > 0 else 0
            if not (h.sigmas[i] <= until or i == h.steps - 1):
                break
            n += 1
        return self.stages[n]


# --- a host ----------------------------------------------------------------------------------------------------------


class Host:
    """A bundle, a size and a number of steps; `run` makes a picture or clip under a written policy."""

    def __init__(
        self, bundle: Path, *, steps: int, height: int, width: int, frames: int | None = None, backend: str = "cpu"
    ):
        self.bundle = bundle
        self.manifest = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
        self.steps, self.height, self.width, self.frames, self.backend = steps, height, width, frames, backend
        self.size = latent_size(self.manifest, height, width, frames)
        self.exact = exact_levels(self.manifest, steps, self.size)
        self.sigmas = noise_levels(self.manifest, steps, self.size)
        self.coarse = sorted({level["patch"] for level in self.manifest["levels"]} - {self.manifest["native"]})
        self._sessions: dict[str, Any] = {}

    def is_for(self, entry: dict) -> bool:
        """Whether a calibration or a path is for these runs."""
        wanted = {"steps": self.steps, "height": self.height, "width": self.width, "frames": self.frames}
        return {name: entry.get(name) for name in wanted} == wanted

    def settings(self, kind: str) -> dict:
        """A calibration of the kind for these runs, or the bundle's defaults."""
        known = self.manifest.get("calibrations", [])
        fitting = [one for one in known if one["kind"] == kind and self.is_for(one)]
        own = [one for one in fitting if one["backend"] == self.backend]
        default = self.manifest["schedule" if kind == "dynamic" else "adaptive"]
        return own[0] if own else fitting[-1] if fitting else default

    def call(self, graph: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a graph on the inputs that it takes of these."""
        info = self.manifest["graphs"][graph]
        if graph not in self._sessions:
            self._sessions[graph] = onnxruntime.InferenceSession(
                self.bundle / info["file"], providers=["CPUExecutionProvider"]
            )
        names = [spec["name"] for spec in info["outputs"]]
        given = {spec["name"]: inputs[spec["name"]] for spec in info["inputs"]}
        return dict(zip(names, self._sessions[graph].run(names, given), strict=True))

    def encode(self, ids: dict[str, list[int]]) -> dict[str, np.ndarray]:
        """Conditions of token ids, filled up."""
        conditions = {}
        for encoder in self.manifest["encoders"]:
            row = ids[encoder["graph"]]
            row = row + [encoder["tokenizer"]["pad_id"]] * (encoder["tokenizer"]["length"] - len(row))
            outputs = self.call(encoder["graph"], {"input_ids": np.array([row], np.int64)})
            conditions |= {encoder["feeds"][name]: value for name, value in outputs.items()}
        return conditions

    def velocity(self, level: int, buffers: dict, negative: dict[str, np.ndarray], size: Size) -> np.ndarray:
        """Run a level; with a negative prompt's conditions twice."""
        graph = next(one["graph"] for one in self.manifest["levels"] if one["patch"] == level)
        buffers = {**buffers, **position_tables(self.manifest, level, size)}
        conditional = self.call(graph, buffers)["velocity"]
        if not negative:
            return conditional
        unconditional = self.call(graph, {**buffers, **negative})["velocity"]
        both = {"velocity_conditional": conditional, "velocity_unconditional": unconditional}
        return self.call("guide", {**buffers, **both})["velocity"]

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Frames (N, height, width, 3) of a latent; of a picture one."""
        decoder = self.manifest["decoder"]
        if decoder["kind"] == "image":
            return np.stack([picture(image) for image in self.call(decoder["graph"], {"latent": latent})["image"]])
        frames, state = [], {}
        for number in range(latent.shape[2]):
            found = self.call(
                decoder["following" if number else "first"],
                {**state, "latent_frame": latent[:, :, number : number + 1]},
            )
            frames += [picture(found["frames"][0, :, one]) for one in range(found["frames"].shape[2])]
            state = {name.removeprefix("next_"): v for name, v in found.items() if name.startswith("next_")}
        return np.stack(frames)

    def empty(self, size: Size, gate: bool) -> dict[str, np.ndarray]:
        """Zeros for every buffer that has a ``next_`` twin."""
        numbers = {"B": 1, **dict(zip("FHW"[-len(size) :], size, strict=True))}

        def side(dim: int | str) -> int:
            symbol, _, divisor = str(dim).partition("/")
            return dim if isinstance(dim, int) else numbers[symbol] // int(divisor or 1)

        graphs = ["step", *([self.manifest["gate"]["graph"]] if gate else [])]
        return {
            spec["name"].removeprefix("next_"): np.zeros([side(dim) for dim in spec["shape"]], F32)
            for graph in graphs
            for spec in self.manifest["graphs"][graph]["outputs"]
            if spec["name"].startswith("next_")
        }

    def run(
        self,
        schedule: str,
        ids: dict[str, list[int]],
        noise: np.ndarray,
        guidance: float,
        carry: float,
        negative_ids: dict[str, list[int]] | None = None,
    ) -> dict:
        """A whole run: a list of what every step did, and the latent."""
        kinds = {part.partition(":")[0]: part for part in schedule.split("+")}
        levels = Levels(next((kinds[k] for k in ("native", "fixed", "dynamic") if k in kinds), "native"), self)
        reuse = next((Reuse(part, self) for k, part in kinds.items() if hasattr(Reuse, "_" + k)), None)
        growing = Progressive(kinds["progressive"], self) if "progressive" in kinds else None
        gate = self.manifest["gate"]["graph"] if reuse and reuse.gate else None
        native = self.manifest["native"]

        coefficients = dct(noise).astype(F32)
        history, exact = History(self.sigmas.copy()), self.exact.copy()
        size = self.size
        latent = noise
        if growing:
            history.scale, size = growing.stages[0].scale, growing.stages[0].size
            low = coefficients[..., : size[-2], : size[-1]]
            latent = idctn(low.astype(np.float64), norm="ortho", axes=(-2, -1))
        conditions = {**self.encode(ids), "guidance": np.array([guidance], F32)}
        two_passes = self.manifest["guidance"]["kind"] == "two_passes" and guidance > 1
        negative = self.encode(negative_ids) if two_passes else {}
        state = {**self.empty(size, bool(gate)), "latent": latent[None].astype(F32)}
        native_done, steps = False, []

        def run_gate() -> None:
            timestep = np.array([told(self.manifest, exact[history.i])], F32)
            found = self.call(gate, {**conditions, **state, "timestep": timestep})
            state["gate_input"] = found["next_gate_input"]
            history.changes[history.i] = tuple(
                float(found[name][0]) for name in ("gate_change", "gate_change_low", "gate_change_high")
            )

        while (i := history.i) < history.steps:
            if gate and i not in history.changes:
                run_gate()
            gain = 1.0
            if growing:
                clean = None
                if history.computed:
                    clean = (state["latent"] - history.sigmas[i] * state["velocities"][:, 0])[0]
                stage = growing.stage(history, clean)
                if stage.scale != history.scale:
                    t, old = float(history.sigmas[i]), size
                    ratio = math.sqrt(math.prod(stage.size) / math.prod(old))
                    gain, size = ratio / (1 + (ratio - 1) * t), stage.size
                    sigmas = history.sigmas.copy()
                    sigmas[i] *= F32(gain)
                    exact[i] = sigmas[i]
                    history = History(sigmas, i, scale=stage.scale)
                    grown = self.call(
                        "grow",
                        {
                            "latent": in_corner(state["latent"], (1, noise.shape[0], *size)),
                            "noise": coefficients[None, ..., : size[-2], : size[-1]],
                            "timestep": np.array([t], F32),
                            "gain": np.array([gain], F32),
                            **growing_tables(old[-2:], size[-2:]),
                        },
                    )
                    state.clear()
                    state.update({**self.empty(size, bool(gate)), "latent": grown["next_latent"]})
                    native_done = False
            found = reuse(history) if reuse else None  # a history that grew knows nothing
            level = None if found and found.enough else levels(history)
            if gate and i not in history.changes:
                run_gate()
            weights = found.weights if found else []
            correction = found.correction if found and level else 0.0
            sigma, after = history.sigmas[i], history.sigmas[i + 1]
            shares = [carry if level == patch and native_done else 0 for patch in self.coarse]
            if self.manifest["sampler"]["kind"] == "flow_unipc":
                past = history.sigmas.astype(np.float64)
                move = {"solver": unipc_solver(past, i, history.first, self.manifest["sampler"]["order"])}
            else:
                move = {"dt": after - sigma}
            rows = {
                "timestep": sigma,
                **move,
                "keep_estimate": level == native,
                "keep_velocity": level is not None,
                "prediction": [*weights, *[0.0] * (state["velocities"].shape[1] - len(weights))],
                "correction": correction,
                "carry": shares,
            }
            buffers = {**conditions, **state, **{name: np.array([value], F32) for name, value in rows.items()}}
            if level is None:
                buffers |= self.call("predict", buffers)
            else:
                asked = {**buffers, "timestep": np.array([told(self.manifest, exact[i])], F32)}
                buffers["velocity"] = self.velocity(level, asked, negative, size)
            results = self.call("step", buffers)
            state.update({name.removeprefix("next_"): v for name, v in results.items() if name.startswith("next_")})
            error = math.sqrt(np.mean(results["prediction_error"].astype(np.float64) ** 2))
            history.levels.append(history.levels[-1] if level is None else level)
            if level is not None:
                history.computed.append(i)
                history.error = error if weights else None
            native_done |= level == native
            if len(history.levels) >= 3:
                history.deviations = {patch: results[f"deviation_{patch}"] for patch in self.coarse}
            steps.append(
                {
                    "step": i,
                    "sigma": float(sigma),
                    "level": level,
                    "prediction": weights,
                    "correction": correction,
                    "scale": str(history.scale),
                    "gain": gain,
                    "error": history.error if level is not None else None,
                    "deviations": history.deviations,
                }
            )
        return {"steps": steps, "latent": state["latent"]}
