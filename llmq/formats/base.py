"""What an on-disk format is: how it is recognised, how a weight and the config are written and
read back, and what it cannot hold.

A format is one module with one instance of a class like this, and one line in
`llmq.formats.registry`. Nobody else asks for a format by its name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from llmq.grid.spec import PER_TENSOR, ActSpec, QuantSpec
from llmq.grid.tensor import QuantizedTensor
from llmq_kernels.core.packing import packed_width

Settings = dict[str, Any]
"""A `quantization_config`."""
Specs = Mapping[str, QuantSpec | None]
"""Every linear layer of a model by name; None: kept in full precision."""
Tables = Mapping[str, tuple[str, QuantSpec]]
"""Embeddings and head by name of module: their role (see `llmq.models.outside.Table`) and spec."""
OWN_METHOD = "llmq"
"""The `quant_method` under which transformers gives a folder to llmq, whoever wrote it."""


class TableRules:
    """What a format does with embeddings and an output head that are quantized; this is what most
    do: nothing."""

    def refusal(self, role: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """Why embeddings, an output head or the tensor that is both cannot be stored quantized, or
        None. role: see `llmq.models.outside.Table`. shape: (vocabulary, D)."""
        return f"its readers take the {role} in 16 bits only"

    def stated(self, config: Settings, tables: Tables) -> Settings:
        """The `quantization_config` with embeddings and head that are stored quantized."""
        return config

    def of_embeddings(self, config: Settings) -> Settings:
        """The `quantization_config` by which `read` reads embeddings, where it has words of its own
        for these."""
        return config


class Format(ABC):
    """name: as in `--format`. marker: the tensor suffix by which a stored layer is recognised.
    suffixes: of the tensors that `read` uses. quant_method: what its config.json says.
    activations: those that a folder of this format always implies, None where the config says
    which. has_order: whether it stores which group a column belongs to. has_columns: whether its
    readers take layers that compute with a transposed weight (`Conv1D`). one_group_size: whether
    some of its readers take one group size for all layers. is_own: whether a model in memory is in
    it. stores_middle: whether layers without zero points are stored with some. tables: what it does
    with embeddings and head. Which engines read it: `llmq.formats.engines`."""

    name: str
    marker: str
    suffixes: frozenset[str]
    quant_method: str
    activations: ActSpec | None = ActSpec()
    has_order: bool = True
    has_columns: bool = True
    one_group_size: bool = False
    is_own: bool = False
    stores_middle: bool = False
    tables: TableRules = TableRules()

    @abstractmethod
    def refusal(self, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """Why a layer of weight shape (N, K) cannot be stored exactly, or None."""

    @abstractmethod
    def write(self, qtensor: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of a layer by suffix."""

    def layer_bytes(
        self, spec: QuantSpec, shape: tuple[int, int], *, act_order: bool = False
    ) -> int:
        """What `write` gives of a layer of weight shape (N, K), without its name, its shape and the
        range of its inputs. act_order: its columns are not in the order of their groups."""
        n, k = shape
        scales = spec.n_scales(n, k) * (4 if spec.scale_dtype == "float32" else 2)
        has_zeros = self.stores_middle or not spec.symmetric
        zeros = self.zero_bytes(spec, shape) if has_zeros else 0
        order = 4 * k if act_order and spec.n_groups(k) > 1 else 0
        return 4 * n * packed_width(k, spec.bits) + scales + zeros + order

    def zero_bytes(self, spec: QuantSpec, shape: tuple[int, int]) -> int:
        """Zero points of a layer that has them: packed along N, as most formats do."""
        n, k = shape
        if spec.group_size == PER_TENSOR:
            return 1
        return 4 * packed_width(n, spec.bits) * spec.n_groups(k)

    @abstractmethod
    def read(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> QuantizedTensor:
        """The layer back from its tensors by suffix. config: as `write_config` or `read_config`
        gives it. Raises `LlmqError` for anything damaged."""

    @abstractmethod
    def write_config(self, specs: Specs, *, act_order: bool = False) -> Settings:
        """The `quantization_config` of config.json. act_order: some layer has a `g_idx`."""

    def read_config(self, settings: Settings) -> Settings:
        """The `quantization_config` of a folder that `detects` claimed, every value that decides a
        weight checked. Raises `LlmqError` for what llmq cannot read."""
        return settings

    def stated_spec(self, name: str, config: Settings) -> QuantSpec | None:
        """How a stored layer is quantized as far as the config says it, for engines go by that;
        None where it takes the tensors to tell. config: as `read_config` gives it."""
        return None

    def states_order(self, config: Settings) -> bool:
        """Whether the config says that columns are not in the order of their groups."""
        return False

    def check_read(self, config: Settings) -> Settings:
        """Settings as `read_config` gives them. Raises `LlmqError` for others: a folder may say of
        itself that they are."""
        return config

    def detects(self, settings: Settings) -> bool:
        """Whether a `quantization_config` is that of a folder of this format."""
        return settings.get("quant_method") == self.quant_method

    def companions(self, config: Settings) -> dict[str, Settings]:
        """Files that go beside config.json, by name. config: as it was written."""
        return {}

    def refusal_of_model(self, specs: Specs) -> str | None:
        """Why layers that could each be stored cannot be stored together, or None."""
        return None

    def refusal_of(self, role: str, spec: QuantSpec, shape: tuple[int, int]) -> str | None:
        """`refusal`, or of a matrix with a role outside of the blocks that of `tables`."""
        if role:
            return self.tables.refusal(role, spec, shape)
        return self.refusal(spec, shape)

    def for_role(self, role: str) -> Format:
        """The format by which a matrix is written: inputs of embeddings and head are not
        quantized, whatever those of layers are. role: "" for a layer."""
        return self.given(ActSpec()) if role else self

    def refusal_of_activations(self, activations: ActSpec) -> str | None:
        """Why a folder cannot say how activations are quantized, or None."""
        if self.activations is None or activations == self.activations:
            return None
        return f"it cannot say that activations are quantized ({activations})"

    def is_first_choice(self, specs: Specs) -> bool:
        """Whether "auto" takes this format for a model that it holds, before those that come after
        it in the registry."""
        return False

    def given(self, activations: ActSpec) -> Format:
        """The format for a folder whose layers quantize their inputs like this, where that decides
        what is stored of a weight."""
        return self

    def with_kept(
        self, config: Settings, names: Collection[str], quantized: Collection[str] = ()
    ) -> Settings:
        """The `quantization_config` with modules that hold a matrix which is no quantized layer:
        the head, routers, towers, layers that the model's class does not load. quantized: names of
        layers."""
        return config

    def with_names(self, config: Settings, stored: Mapping[str, str]) -> Settings:
        """The `quantization_config` with what it says of layers said by further names, too. stored:
        of layers and of modules of experts, as `engine_names.with_modules` gives them."""
        return config

    def dense(
        self, name: str, tensors: dict[str, Tensor], config: Settings, shape: tuple[int, int]
    ) -> Tensor | None:
        """The weight float32 `[N, K]` of a layer that llmq has no kernel for, or None for one that
        `read` gives."""
        return None

    def is_online(self, config: Settings) -> bool:
        """Whether weights are stored in full precision, for whoever loads them to quantize."""
        return False

    def from_weight(self, weight: Tensor) -> QuantizedTensor:
        """A layer of such a folder. weight: `[N, K]`."""
        raise NotImplementedError(self.name)

    def activations_of(self, name: str, config: Settings) -> ActSpec:
        """How the inputs of a layer are quantized."""
        return ActSpec.from_json(config.get("activations") or {})

    def remarks(self, config: Settings, stored: Mapping[str, str]) -> list[str]:
        """What llmq does otherwise than a folder says. stored: the dtype of each of its tensors, as
        safetensors calls it."""
        return []

    def bias(self, bias: Tensor, tensors: dict[str, Tensor], config: Settings) -> Tensor:
        """What is added to a layer's output, from what is stored."""
        return bias
