"""TensorRT without a GPU, in the API of one real release: a name that the release lacks is an AttributeError here.

``tests/data/tensorrt`` lists every class, attribute and enum value of four releases' Python bindings. Plans hold the
ONNX model that they were built from, and an execution context runs it with ONNX Runtime on the fake GPU's memory.
"""

import json
import sys
from base64 import b64decode, b64encode
from enum import IntEnum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
from onnx.external_data_helper import load_external_data_for_model

from ddit.runtime.backends.onnxruntime.host import session_options
from fake_cuda import FakeCuda

DATA = Path(__file__).parent / "data" / "tensorrt"
VERSIONS = sorted((path.stem for path in DATA.glob("*.json")), key=lambda version: [*map(int, version.split("."))])
NEWEST_OPSET = {"8.6.0": 17, "10.9.0.34": 22, "10.16.1.11": 24, "11.4.0.106": 24}
TYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.INT64: "INT64"}
NUMPY = {"FLOAT": np.float32, "INT64": np.int64, "INT32": np.int32}
SCRATCH = {"level-2": 4096, "level-4": 2048, "level-8": 1024, "vae_decoder": 8192}


class FakeTensorRT(ModuleType):
    """One release's module, on a fake GPU."""

    def __init__(self, version: str, cuda: FakeCuda):
        super().__init__("tensorrt")
        self.__spec__ = ModuleSpec("tensorrt", None, origin=__file__)  # torch asks for it
        self.__version__ = version
        self.cuda = cuda
        self.api = {name: set(members) for name, members in json.loads((DATA / f"{version}.json").read_text()).items()}
        self.builds = 0
        self.contexts = 0
        self.failure: str | None = None  # what the next build reports instead of a plan
        self.configs: list[Config] = []
        for name, members in self.api.items():
            if name[0].isupper() and "__init__" not in members:
                setattr(self, name, IntEnum(name, sorted(members), start=0))
        for name, kind in KINDS.items():
            if name in self.api:
                setattr(self, name, type(name, (kind,), {"trt": self, "names": self.api[name]}))

    def install(self, monkeypatch) -> "FakeTensorRT":
        """Be ``tensorrt``, for Polygraphy too."""
        monkeypatch.setitem(sys.modules, "tensorrt", self)
        for name in list(sys.modules):  # it remembers the module that it found first
            if name.startswith("polygraphy"):
                monkeypatch.delitem(sys.modules, name)
        return self


class Api:
    """An object of TensorRT's; shows only what the release has. What begins with an underscore is the fake's own."""

    trt: FakeTensorRT
    names: set[str]

    def __getattribute__(self, name: str):
        cls = type(self)
        if not name.startswith("_") and name != "trt" and name not in cls.names:
            raise AttributeError(f"TensorRT {cls.trt.__version__} has no {cls.__name__}.{name}")
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value):
        cls = type(self)
        if not name.startswith("_") and name not in cls.names:
            raise AttributeError(f"TensorRT {cls.trt.__version__} has no {cls.__name__}.{name}")
        object.__setattr__(self, name, value)


class Base:
    """A class that hosts derive from: ILogger, IProgressMonitor."""

    trt: FakeTensorRT
    names: set[str]
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class Tensor(Api):
    is_shape_tensor = False
    dtype = None

    def __init__(self, name, shape):
        self.name, self.shape = name, shape


class Layer(Api):
    precision_is_set = False

    def __init__(self, type):
        self.type = type


class Attention(Api):
    decomposable = False


class AttentionInput(Api):
    attention = property(lambda self: self._attention)


class Network(Api):
    def __init__(self):
        self._name, self._model, self._inputs, self._layers = None, None, [], []

    num_inputs = property(lambda self: len(self._inputs))
    num_layers = property(lambda self: len(self._layers))

    def get_input(self, index):
        return self._inputs[index]

    def get_layer(self, index):
        return self._layers[index]

    def __iter__(self):
        return iter(self._layers)


class ParserError(Api):
    def __init__(self, text):
        self._text = text

    def desc(self):
        return self._text

    def node(self):
        return 3

    def node_name(self):
        return "node_of_the_fake"


class Parser(Api):
    def __init__(self, network, logger):
        self._network, self._errors = network, []

    num_errors = property(lambda self: len(self._errors))

    def get_error(self, index):
        return self._errors[index]

    def parse(self, content, path):
        trt = self.trt
        model = onnx.load_from_string(content)
        load_external_data_for_model(model, str(Path(path).parent))
        opset = next(entry.version for entry in model.opset_import if entry.domain == "")
        if opset > NEWEST_OPSET[trt.__version__]:
            self._errors.append(trt.ParserError(f"opset {opset} is not supported"))
            return False
        self._network._name, self._network._model = Path(path).stem, model
        for value in model.graph.input:
            shape = tuple(dim.dim_value or -1 for dim in value.type.tensor_type.shape.dim)
            self._network._inputs.append(trt.ITensor(value.name, shape))
        for node in model.graph.node:
            if node.op_type == "Attention":
                layer = trt.ILayer(trt.LayerType.ATTENTION_INPUT)
                layer._attention = trt.IAttention()
                self._network._layers.append(layer)
        return True


class TimingCache(Api):
    def __init__(self, content):
        self._content = content

    def combine(self, other, ignore_mismatch):
        self._content += other._content
        return True

    def serialize(self):
        return self._content


class OptimizationProfile(Api):
    def __init__(self):
        self._shapes = {}

    def set_shape(self, name, low, best, high):
        self._shapes[name] = [tuple(low), tuple(best), tuple(high)]


class Config(Api):
    DLA_core = -1
    default_device_type = None
    profiling_verbosity = builder_optimization_level = progress_monitor = None

    def __init__(self):
        self._flags, self._profiles, self._pools, self._cache, self._sources = set(), [], {}, None, None
        self._features = set()

    num_optimization_profiles = property(lambda self: len(self._profiles))

    def set_flag(self, flag):
        self._flags.add(flag.name)

    def clear_flag(self, flag):
        self._flags.discard(flag.name)

    def get_flag(self, flag):
        return flag.name in self._flags

    def add_optimization_profile(self, profile):
        self._profiles.append(profile._shapes)
        return len(self._profiles) - 1

    def set_memory_pool_limit(self, pool, nbytes):
        self._pools[pool.name] = nbytes

    def get_memory_pool_limit(self, pool):
        return self._pools.get(pool.name, 0)

    def set_tactic_sources(self, sources):
        self._sources = sources

    def get_tactic_sources(self):
        return self._sources or 0

    def set_preview_feature(self, feature, on):
        self._features.add(feature.name)

    def get_preview_feature(self, feature):
        return feature.name in self._features

    def create_timing_cache(self, content):
        return None if content.startswith(b"damaged") else self.trt.ITimingCache(content)

    def set_timing_cache(self, cache, ignore_mismatch):
        self._cache = cache

    def get_timing_cache(self):
        return self._cache


class HostMemory(bytes):
    """A serialized plan."""


class Builder(Api):
    def __init__(self, logger):
        assert self.trt.cuda.devices, "TensorRT crashes without a GPU"
        self._logger = logger

    def create_network(self, flags):
        flag = self.trt.NetworkDefinitionCreationFlag
        wanted = flag.STRONGLY_TYPED if hasattr(flag, "STRONGLY_TYPED") else flag.EXPLICIT_BATCH
        assert flags == 1 << int(wanted)
        return self.trt.INetworkDefinition()

    def create_builder_config(self):
        config = self.trt.IBuilderConfig()
        self.trt.configs.append(config)
        return config

    def create_optimization_profile(self):
        return self.trt.IOptimizationProfile()

    def build_serialized_network(self, network, config):
        trt = self.trt
        if trt.failure:
            self._logger.log(trt.ILogger.ERROR, trt.failure)
            return None
        for layer in network._layers:
            assert layer._attention.decomposable, "no fused kernel, and the attention may not be decomposed"
        if monitor := getattr(config, "progress_monitor", None):
            monitor.phase_start("Building", None, 2)
            if not all(monitor.step_complete("Building", step) for step in range(2)):
                return None
            monitor.phase_finish("Building")
        trt.builds += 1
        config._cache._content += b"timed;"
        model = b64encode(network._model.SerializeToString()).decode()
        plan = {"name": network._name, "model": model, "profiles": config._profiles, "version": trt.__version__}
        return HostMemory(json.dumps(plan).encode())


class Runtime(Api):
    def __init__(self, logger):
        assert self.trt.cuda.devices, "TensorRT crashes without a GPU"
        self._logger = logger

    def deserialize_cuda_engine(self, content):
        try:
            plan = json.loads(bytes(memoryview(content)))
            assert plan["version"] == self.trt.__version__
        except (ValueError, AssertionError):
            self._logger.log(self.trt.ILogger.ERROR, "the serialized engine is not valid")
            return None
        return self.trt.ICudaEngine(plan)


class Engine(Api):
    def __init__(self, plan):
        self._plan = plan
        self._name = plan["name"]
        content = b64decode(plan["model"])
        model = onnx.load_from_string(content)
        self._types = {
            value.name: self._type(TYPES[value.type.tensor_type.elem_type])
            for value in (*model.graph.input, *model.graph.output)
        }
        self._session = onnxruntime.InferenceSession(content, session_options(), providers=["CPUExecutionProvider"])

    device_memory_size = device_memory_size_v2 = property(lambda self: SCRATCH.get(self._name, 512))

    def _type(self, name):
        return self.trt.DataType["INT32" if name == "INT64" and not hasattr(self.trt.DataType, "INT64") else name]

    def get_tensor_dtype(self, name):
        return self._types[name]

    def create_execution_context(self, strategy):
        assert strategy == self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        return self.trt.IExecutionContext(self)

    def create_execution_context_without_device_memory(self):
        return self.trt.IExecutionContext(self)


class Context(Api):
    def __init__(self, engine):
        self.trt.contexts += 1
        self._engine, self._profile, self._shapes, self._addresses = engine, None, {}, {}
        self._scratch = None

    def _set_memory(self, address):
        self._scratch = address

    device_memory = property(None, _set_memory)

    def set_device_memory(self, address, nbytes):
        assert nbytes >= SCRATCH.get(self._engine._name, 512)
        self._scratch = address

    def set_optimization_profile_async(self, index, stream):
        self._profile = self._engine._plan["profiles"][index]
        return True

    def set_input_shape(self, name, shape):
        low, _, high = self._profile[name]
        self._shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        assert stream == 77, "on another stream"
        assert self._scratch, "no scratch memory"
        engine, cuda = self._engine, self.trt.cuda
        shapes, addresses, scratch = dict(self._shapes), dict(self._addresses), self._scratch
        assert addresses.keys() == engine._types.keys()

        def work():
            size = SCRATCH.get(engine._name, 512)
            cuda.write(scratch, bytes(size))  # the engine uses all of it
            inputs = {}
            for value in engine._session.get_inputs():
                dtype = np.dtype(NUMPY[engine._types[value.name].name])
                nbytes = int(np.prod(shapes[value.name])) * dtype.itemsize
                array = np.frombuffer(cuda.read(addresses[value.name], nbytes), dtype).reshape(shapes[value.name])
                inputs[value.name] = array.astype(np.int64) if dtype == np.int32 else array
            names = [value.name for value in engine._session.get_outputs()]
            for name, array in zip(names, engine._session.run(names, inputs), strict=True):
                cuda.write(addresses[name], array.tobytes())

        cuda.submit(work)
        return True


KINDS = {
    "ILogger": Base,
    "IProgressMonitor": Base,
    "Builder": Builder,
    "INetworkDefinition": Network,
    "ITensor": Tensor,
    "ILayer": Layer,
    "IAttention": Attention,
    "IAttentionInputLayer": AttentionInput,
    "OnnxParser": Parser,
    "ParserError": ParserError,
    "IBuilderConfig": Config,
    "ITimingCache": TimingCache,
    "IOptimizationProfile": OptimizationProfile,
    "Runtime": Runtime,
    "ICudaEngine": Engine,
    "IExecutionContext": Context,
}
