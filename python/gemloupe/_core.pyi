from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

__version__: str
DEFAULT_CHUNK: int
PACKED_VERSION: int

class LayerConfig:
    kind: str
    window: int
    head_dim: int
    num_kv_heads: int
    intermediate_size: int
    kv_source: int
    values_are_keys: bool
    has_experts: bool
    rope_theta: float
    rotary_pairs: int
    rope_factor: float
    def __init__(self) -> None: ...

class TextConfig:
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float
    max_position_embeddings: int
    final_logit_softcapping: float
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    bidirectional: str
    layers: list[LayerConfig]
    def __init__(self) -> None: ...

class TensorEntry:
    def __init__(
        self, name: str, dtype: str, shape: Sequence[int], begin: int, end: int
    ) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def begin(self) -> int: ...
    @property
    def end(self) -> int: ...

class GgufFile:
    def __init__(self, path: str) -> None: ...
    @property
    def version(self) -> int: ...
    @property
    def alignment(self) -> int: ...
    @property
    def tensors(self) -> list[TensorEntry]: ...
    @property
    def keys(self) -> list[str]: ...
    def get(self, key: str) -> Any: ...
    def length(self, key: str) -> int | None: ...
    def item(self, key: str, index: int) -> Any: ...
    def indices(self, key: str, texts: Sequence[str]) -> list[int | None]: ...

class KvCache:
    @property
    def length(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def tokens(self) -> list[int]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    def layer_nbytes(self, layer: int) -> int: ...
    def layer_window(self, layer: int) -> int: ...
    def layer_source(self, layer: int) -> int: ...
    def layer_key_weight(self, layer: int) -> np.ndarray: ...
    def layer_storage(self, layer: int) -> str: ...
    def first_position(self, layer: int) -> int: ...
    def read(
        self, layer: int, begin: int = 0, end: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def set(
        self,
        layer: int,
        positions: Sequence[int],
        keys: np.ndarray | None,
        values: np.ndarray | None,
    ) -> None: ...
    def copy_from(self, other: KvCache, layer: int, positions: Sequence[int]) -> None: ...
    def splice(
        self, kept: Sequence[tuple[int, int]], other: KvCache | None = None, at: int = 0
    ) -> None: ...
    def read_bits(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]: ...
    def write_bits(
        self,
        layer: int,
        keys: np.ndarray,
        values: np.ndarray,
        key_scales: np.ndarray,
        value_scales: np.ndarray,
    ) -> None: ...
    def adopt(self, tokens: Sequence[int], first: Sequence[int]) -> None: ...
    def separate_keys(self, layer: int) -> None: ...
    @property
    def shared_nbytes(self) -> int: ...
    @property
    def shortest_length(self) -> int: ...
    @property
    def full_sliding(self) -> bool: ...
    @property
    def model_id(self) -> int: ...
    def layer_shape(self, layer: int) -> tuple[int, int, int]: ...
    def truncate(self, length: int) -> None: ...
    def rewind(self, length: int) -> None: ...
    def fork(self) -> KvCache: ...
    def append_random(self, ids: Sequence[int], seed: int) -> None: ...
    def restore(self, fork: KvCache) -> None: ...

class Weights:
    def __init__(self) -> None: ...
    def add_file(self, path: str, entries: Sequence[TensorEntry]) -> None: ...
    def add_values(self, name: str, values: Any) -> None: ...
    def add_pack_quantized(
        self,
        name: str,
        shape: Sequence[int],
        packed_path: str,
        packed: TensorEntry,
        scales_path: str,
        scales: TensorEntry,
    ) -> None: ...
    def set_target(self, name: str, dtype: str) -> None: ...
    def set_resident(self, resident: bool) -> None: ...

class TextModelOptions:
    bfloat16_matmul: bool
    float32_activations: bool
    round_embed_scale: bool
    invariant: bool
    expert_memory: int
    threads: int
    kv_dtype: str
    def __init__(self) -> None: ...

class MediaInput:
    def __init__(
        self,
        rows: Sequence[int],
        soft_tokens: np.ndarray,
        padding_id: int,
        blocks: Sequence[tuple[int, int]],
    ) -> None: ...

class VisionConfig:
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    patch_size: int
    pooling_kernel_size: int
    position_embedding_size: int
    rms_norm_eps: float
    rope_theta: float
    use_clipped_linears: bool
    standardize: bool
    mm_embed_dim: int
    mm_posemb_size: int
    text_hidden_size: int
    def __init__(self) -> None: ...

class VisionOptions:
    bfloat16_matmul: bool
    invariant: bool
    threads: int
    def __init__(self) -> None: ...

class VisionModel:
    def __init__(self, config: VisionConfig, weights: Weights, options: VisionOptions) -> None: ...
    def encode(
        self,
        patches: np.ndarray,
        columns: int,
        hooks: Hooks | None = ...,
        first_row: int = ...,
        adapters: Sequence[tuple[Adapter, float]] = ...,
    ) -> np.ndarray: ...

class TokenScores:
    def __init__(self, targets: Sequence[int]) -> None: ...
    @property
    def logprobs(self) -> np.ndarray: ...
    @property
    def entropy(self) -> np.ndarray: ...

class TextModel:
    def __init__(
        self,
        config: TextConfig,
        weights: Weights,
        options: TextModelOptions,
        progress: Callable[[float], None] | None = None,
    ) -> None: ...
    def override(self, weights: Sequence[tuple[str, np.ndarray]], dtype: str) -> TextModel: ...
    def weight_dtype(self, name: str) -> str: ...
    def weight_rows(self, name: str, ids: Sequence[int]) -> np.ndarray: ...
    @property
    def expert_cache(self) -> dict[str, int] | None: ...
    @property
    def threads(self) -> int: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def mapped_bytes(self) -> int: ...
    def run(
        self,
        ids: Sequence[int],
        cache: KvCache,
        logits_begin: int,
        logits_end: int,
        hooks: Hooks | None,
        softcap: float | None,
        chunk: int,
        first_layer: int = ...,
        resid_pre: np.ndarray | None = ...,
        adapters: Sequence[tuple[Adapter, float]] = ...,
        media: MediaInput | None = ...,
        vocab: Sequence[int] = ...,
        scores: TokenScores | None = ...,
    ) -> np.ndarray | None: ...
    def unembed(
        self, x: np.ndarray, norm: bool, softcap: float | None, vocab: Sequence[int]
    ) -> np.ndarray: ...

class DrafterConfig:
    text: TextConfig
    backbone_hidden_size: int
    num_clusters: int
    centroid_top_k: int
    cluster_tokens: Sequence[int]
    def __init__(self) -> None: ...

class Drafter:
    def __init__(
        self,
        config: DrafterConfig,
        target: TextModel,
        weights: Weights,
        progress: Callable[[float], None] | None = ...,
    ) -> None: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def mapped_bytes(self) -> int: ...
    def draft(
        self, target: TextModel, cache: KvCache, token: int, hidden: np.ndarray, count: int
    ) -> list[int]: ...

class Adapter:
    def __init__(self, model: TextModel, dtype: str) -> None: ...
    def add(
        self,
        layer: int,
        module: str,
        a: np.ndarray,
        b: np.ndarray,
        scale: float,
        gain: np.ndarray | None = ...,
    ) -> None: ...
    def add_experts(
        self, layer: int, module: str, a: np.ndarray, b: np.ndarray, scale: float
    ) -> None: ...
    def replace(self, layer: int, module: str, weight: np.ndarray) -> None: ...
    def shift(self, layer: int, module: str, shift: np.ndarray) -> None: ...
    def replace_rows(self, module: str, ids: Sequence[int], rows: np.ndarray) -> None: ...
    @property
    def nbytes(self) -> int: ...

def merge_adapters(
    model: TextModel,
    adapters: Sequence[tuple[Adapter, float]],
    requantize: bool = ...,
    progress: Callable[[float], None] | None = ...,
) -> list[tuple[str, float]]: ...
def adapted_module_shape(model: TextModel, layer: int, module: str) -> list[int] | None: ...

class PositionFilter:
    def __init__(self, listed: Sequence[int], begin: int | None) -> None: ...

class Edit: ...

class Hooks:
    check_finite: bool
    expected_rows: int
    def __init__(self) -> None: ...
    def add_capture(
        self,
        point: int,
        layer: int,
        filter: PositionFilter,
        before: bool,
        reduce: str,
        group: int,
    ) -> int: ...
    def add_delta_capture(
        self,
        adapter: Adapter,
        module: str,
        layer: int,
        filter: PositionFilter,
        reduce: str,
    ) -> int: ...
    def add_edit(self, point: int, layer: int, filter: PositionFilter, edit: Edit) -> None: ...
    def take(self, index: int) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, int]]]: ...

class SamplingOptions:
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int
    suppress: list[int]
    def __init__(self) -> None: ...

class RowRequest:
    ids: list[int]
    cache: KvCache | None
    max_new_tokens: int
    sampling: SamplingOptions
    stop_ids: list[int]
    logprobs: int
    prompt_logprobs: int
    softcap: float | None
    hooks: Hooks | None
    mask: TokenMask | None
    drafter: Drafter | None
    draft_tokens: int
    lookup_ngram: int
    cuts: list[int]
    adapters: Sequence[tuple[Adapter, float]]
    media: MediaInput | None
    def __init__(self) -> None: ...

class TokenMask:
    def __init__(self, vocab_size: int) -> None: ...
    @property
    def words(self) -> np.ndarray: ...
    def allow(self) -> None: ...
    def allow_all(self) -> None: ...
    def fail(self, reason: str) -> None: ...

class TokenLogprobs:
    @property
    def logprob(self) -> float: ...
    @property
    def top(self) -> list[tuple[int, float]]: ...

class StepResult:
    @property
    def row(self) -> int: ...
    @property
    def token(self) -> int: ...
    @property
    def prefilled(self) -> int: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def error(self) -> str: ...
    @property
    def logprobs(self) -> TokenLogprobs | None: ...
    @property
    def prompt_logprobs(self) -> list[TokenLogprobs]: ...

class Session:
    def __init__(self, model: TextModel, chunk: int = ...) -> None: ...
    def submit(self, request: RowRequest) -> int: ...
    def step(self) -> list[StepResult]: ...
    def drafts(self, row: int) -> tuple[int, int, int]: ...
    def cancel(self, row: int) -> None: ...
    def rollback(self, row: int) -> None: ...
    def release(self, row: int) -> None: ...
    def cache(self, row: int) -> KvCache: ...
    @property
    def active(self) -> int: ...

def write_packed(
    weights: Weights,
    path: str,
    tensors: Sequence[tuple[str, bool]],
    metadata: str,
    threads: int,
    progress: Callable[[float], None] | None = None,
) -> None: ...
def read_packed(path: str) -> tuple[list[TensorEntry], bytes]: ...
def damaged_tensors(path: str, progress: Callable[[float], None] | None = None) -> list[str]: ...
def tensor_bytes(dtype: str, shape: Sequence[int]) -> int: ...
def new_cache(
    model: TextModel,
    max_tokens: int,
    dtype: str,
    start: int,
    full_sliding: bool,
    chunk: int,
    separate_keys: bool = False,
) -> KvCache: ...
def kv_total_bytes(caches: Sequence[KvCache]) -> int: ...
def kv_bytes_needed(
    config: TextConfig,
    dtype: str,
    tokens: int,
    chunk: int,
    full_sliding: bool = False,
    separate_keys: bool = False,
) -> int: ...
def hook_points(tower: str = "") -> list[tuple[str, bool, str, bool, str, str]]: ...
def first_hook_point(tower: str) -> int: ...
def vision_hook_points() -> list[tuple[int, str, bool, str, bool, str]]: ...

class AudioConfig:
    text_hidden_size: int
    rms_norm_eps: float
    feature_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    subsampling_conv_channels: list[int]
    conv_kernel_size: int
    residual_weight: float
    attention_context_left: int
    attention_logit_cap: float
    gradient_clipping: float
    use_clipped_linears: bool
    output_proj_dims: int
    def __init__(self) -> None: ...

class AudioTowerOptions:
    bfloat16_matmul: bool
    invariant: bool
    threads: int
    def __init__(self) -> None: ...

class AudioState:
    def __init__(self) -> None: ...
    @property
    def tokens(self) -> int: ...
    @property
    def ended(self) -> bool: ...

class AudioTower:
    def __init__(
        self,
        config: AudioConfig,
        weights: Weights,
        options: AudioTowerOptions,
        progress: Callable[[float], None] | None = None,
    ) -> None: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def mapped_bytes(self) -> int: ...
    def encode(
        self,
        features: np.ndarray,
        state: AudioState,
        last: bool,
        hooks: Hooks | None = None,
        adapters: Sequence[tuple[Adapter, float]] = ...,
    ) -> np.ndarray: ...

def function_edit(
    function: Callable[[np.ndarray, np.ndarray, bool, int], np.ndarray], tail: Sequence[int]
) -> Edit: ...
def value_edit(
    op: str,
    values: np.ndarray,
    positions: Sequence[int],
    columns: Sequence[tuple[int, int]],
    heads: Sequence[int],
) -> Edit: ...
def mask_edges(keys: PositionFilter, heads: Sequence[int]) -> Edit: ...
def replace_experts(ids: Sequence[int], values: np.ndarray) -> Edit: ...
def set_features(
    encoder: np.ndarray,
    decoder: np.ndarray,
    bias: Sequence[float],
    threshold: Sequence[float],
    target: Sequence[float],
) -> Edit: ...
def isa() -> str: ...
def detected_isa() -> str: ...
def cpu_model() -> str: ...
def available_cpus() -> int: ...
def available_memory() -> int: ...
def onednn_version() -> str: ...
def measure_bandwidth(threads: int) -> float: ...
