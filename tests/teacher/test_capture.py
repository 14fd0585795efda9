"""The teacher's captured columns against the model run alone, row by row."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel

from teacher.rows import make_row
from teachercache.errors import ModelError
from teachercache.models.loading import load_causal_lm
from teachercache.models.memory import LITTLE_BYTES, is_out_of_memory
from teachercache.models.probes import isolates_packed_segments
from teachercache.targets import HeadSketch, StoredTargets, TopK
from teachercache.teacher import Teacher, length_sorted_batches
from teachercache.tokens.rows import TokenRow

from builders import tiny_model

VOCABULARY = 90


def make_teacher(model, *, layout: str = "documents", vocabulary: int = VOCABULARY, k: int = 8) -> Teacher:
    return Teacher.of(model, targets=StoredTargets(TopK(k, (1.0, 2.0), "float32", vocabulary)), layout=layout, pad_id=0)


def alone(model, row: TokenRow, *, vocabulary: int = VOCABULARY, k: int = 8) -> dict[str, np.ndarray]:
    """Naive twin: each segment in a forward pass of its own, whole logits, no batching."""
    starts = [*(segment.start for segment in row.segments), row.length]
    parts = []
    with torch.no_grad():
        for start, end in pairwise(starts):
            ids = torch.from_numpy(row.input_ids_S[start:end].astype(np.int64))[None]
            parts.append(model(input_ids=ids, use_cache=False).logits[0])
    logits_SV = torch.cat(parts)[torch.from_numpy(row.target_mask_S)].float()
    kind = TopK(k, (1.0, 2.0), "float32", vocabulary)
    return kind.capture(torch, logits_SV, torch.from_numpy(row.labels_N().astype(np.int64)))


def assert_same(captured, expected):
    for name, values in expected.items():
        if name != "head_ids":
            np.testing.assert_allclose(captured[name], values, atol=1e-4)
    # Ids may swap where two logits tie within rounding.
    differing = captured["head_ids"] != expected["head_ids"]
    assert differing.mean() < 0.01


@pytest.mark.parametrize("positions_per_batch", [1, 64, 4096])
def test_batched_capture_equals_one_by_one(positions_per_batch):
    model = tiny_model(vocabulary=VOCABULARY)
    rows = [make_row(length, seed=length) for length in (2, 31, 7, 64, 3, 30, 50)]
    for row, captured in zip(
        rows, make_teacher(model).capture(rows, positions_per_batch=positions_per_batch), strict=True
    ):
        assert captured.row is row
        assert captured.columns is not None and len(captured.columns["head_ids"]) == row.length - 1
        assert_same(captured.columns, alone(model, row))


def test_a_tokenizer_with_tokens_that_the_teacher_does_not_predict():
    with pytest.raises(
        ModelError, match=f"predicts 80 tokens, its tokenizer has {VOCABULARY}; take the tokenizer that"
    ):
        make_teacher(tiny_model(vocabulary=80))


def test_packed_segments_do_not_see_each_other():
    model = tiny_model(vocabulary=VOCABULARY)
    rows = [make_row(40, seed=1, starts=(0, 11, 25)), make_row(17, seed=2, starts=(0, 2))]
    for row, captured in zip(
        rows, make_teacher(model, layout="packed").capture(rows, positions_per_batch=999), strict=True
    ):
        assert_same(captured.columns, alone(model, row))


def test_a_model_that_mixes_packed_segments_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    mamba = MambaForCausalLM(
        MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    ).eval()
    assert isolates_packed_segments(tiny_model(vocabulary=VOCABULARY), vocabulary_size=VOCABULARY)
    with pytest.raises(ModelError, match="sequence.layout: documents"):
        make_teacher(mamba, layout="packed")


def test_soft_capped_logits_are_the_models_own():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=2.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(200)
    row = make_row(20, seed=3)
    [captured] = make_teacher(model).capture([row], positions_per_batch=64)
    assert_same(captured.columns, alone(model, row))
    assert captured.columns["head_logits"].min() > -4.01  # two caps apart at most


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_a_half_precision_teacher_are_summed_in_float32(dtype):
    model = tiny_model(vocabulary=VOCABULARY).to(dtype)
    row = make_row(20, seed=5)
    [captured] = make_teacher(model).capture([row], positions_per_batch=64)
    with torch.no_grad():
        hidden = model.model(torch.from_numpy(row.input_ids_S.astype(np.int64))[None])[0][0][: row.positions]
        exact = torch.nn.functional.linear(hidden.double(), model.lm_head.weight.double())
        rounded = model.lm_head(hidden).float()
    head = exact.topk(8)[0]
    np.testing.assert_allclose(captured.columns["head_logits"], (head - head[:, :1]).numpy(), atol=2e-5)
    assert (rounded.topk(8)[0] - head).abs().max() > 2e-4  # what the model itself would have said


def test_a_soft_capped_teacher_never_forms_the_logits_of_a_whole_batch():
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, final_logit_softcapping=20.0,
    )  # fmt: skip
    teacher = make_teacher(Gemma2ForCausalLM(config).eval())
    teacher.backend.model.lm_head.register_forward_hook(
        lambda *_: pytest.fail("the model projected a whole batch itself")
    )
    [captured] = teacher.capture([make_row(20, seed=3)], positions_per_batch=64)
    assert captured.columns is not None


class ProjectsByItself(LlamaForCausalLM):
    """Uses its output layer's weight without calling the layer, as some remote code does."""

    def forward(self, input_ids=None, **inputs):
        output = super().forward(input_ids=input_ids, **inputs)
        output.logits = torch.nn.functional.linear(self.model(input_ids=input_ids)[0], self.lm_head.weight)
        return output


class NeverCallsItsHead(LlamaForCausalLM):
    def forward(self, input_ids=None, **inputs):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        hidden = self.model(input_ids=input_ids, **inputs)[0]
        return CausalLMOutputWithPast(logits=torch.nn.functional.linear(hidden, self.lm_head.weight))


@pytest.mark.parametrize("kind", [ProjectsByItself, NeverCallsItsHead])
def test_a_teacher_that_projects_by_itself_is_run_whole(kind):
    plain = tiny_model(vocabulary=VOCABULARY)
    model = kind(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    row = make_row(20, seed=3)
    [captured] = make_teacher(model).capture([row], positions_per_batch=64)
    assert_same(captured.columns, alone(plain, row))


def test_padded_output_rows_take_no_part():
    model = tiny_model(vocabulary=VOCABULARY + 38)
    row = make_row(25, seed=4)
    [captured] = make_teacher(model).capture([row], positions_per_batch=64)
    assert captured.columns["head_ids"].max() < VOCABULARY
    assert_same(captured.columns, alone(model, row))


class LittleMemory(LlamaModel):
    """A real model that has room for 64 tokens at once."""

    def forward(self, input_ids=None, **inputs):
        if input_ids.numel() > 64:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(input_ids=input_ids, **inputs)


def little_memory_model() -> LlamaForCausalLM:
    model = tiny_model(vocabulary=VOCABULARY)
    body = LittleMemory(LlamaConfig(**model.config.to_dict())).eval()
    body.load_state_dict(model.model.state_dict())
    model.model = body
    return model


def test_a_batch_that_runs_out_of_memory_is_halved():
    model = little_memory_model()
    rows = [make_row(16, seed=seed) for seed in range(10)]
    teacher = make_teacher(model)
    results = teacher.capture(rows, positions_per_batch=160)
    assert teacher.batches_halved == 3  # 10 → 5 + 5 → 2 + 3 each
    for row, captured in zip(rows, results, strict=True):
        assert_same(captured.columns, alone(model, row))


def test_a_row_that_never_fits_gets_a_problem_and_the_others_their_targets():
    rows = [make_row(80, seed=1), make_row(10, seed=2)]
    long, short = make_teacher(little_memory_model()).capture(rows, positions_per_batch=4096)
    assert long.columns is None and long.problem == "out of memory with this row of 80 tokens alone (out of memory)"
    assert short.columns is not None


class BusyDevice(LlamaModel):
    """A real model on a device that others use too: each of its first `failures` passes finds no memory, and says so as
    `error`."""

    failures, error = 0, RuntimeError("")

    def forward(self, input_ids=None, **inputs):
        if self.failures > 0:
            self.failures -= 1
            raise self.error
        return super().forward(input_ids=input_ids, **inputs)


def busy_teacher(*, failures: int, error: Exception) -> Teacher:
    model = tiny_model(vocabulary=VOCABULARY)
    body = BusyDevice(LlamaConfig(**model.config.to_dict())).eval()
    body.load_state_dict(model.model.state_dict())
    model.model = body
    teacher = make_teacher(model)
    body.failures, body.error = failures, error
    return teacher


ALLOCATIONS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    MemoryError(),
]


@pytest.mark.parametrize("error", ALLOCATIONS, ids=lambda error: type(error).__name__)
def test_a_passing_want_of_memory_loses_no_row(error):
    """10 rows, then 5, 2 and 1: the fourth attempt is a lone row's, and so is the fifth."""
    rows = [make_row(16, seed=seed) for seed in range(10)]
    teacher = busy_teacher(failures=5, error=error)
    results = teacher.capture(rows, positions_per_batch=160)
    assert [captured.problem for captured in results] == [None] * 10
    for row, captured in zip(rows, results, strict=True):
        assert captured.row is row
        assert_same(captured.columns, alone(teacher.backend.model, row))


def test_losses_of_labels_survive_a_passing_want_of_memory():
    rows = [make_row(16, seed=seed) for seed in range(3)]
    calm = busy_teacher(failures=0, error=ALLOCATIONS[0]).label_nats(rows, positions_per_batch=160)
    for failures, lost in ((3, 0), (10**6, 3)):
        busy = busy_teacher(failures=failures, error=ALLOCATIONS[0]).label_nats(rows, positions_per_batch=160)
        assert sum(found is None for found in busy) == lost
        for found, expected in zip(busy, calm, strict=True):
            assert found is None or np.allclose(found, expected, atol=1e-5)


def test_a_lone_row_is_tried_three_times():
    row = make_row(16, seed=1)
    told = "out of memory with this row of 16 tokens alone (CUDA out of memory. Tried to allocate 2 GiB)"
    for failures, problem in ((2, None), (3, told)):
        [captured] = busy_teacher(failures=failures, error=ALLOCATIONS[0]).capture([row], positions_per_batch=160)
        assert captured.problem == problem


@pytest.mark.parametrize(
    "said", ["CUDA error: device-side assert triggered", "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"]
)
def test_another_error_is_no_want_of_memory(said):
    """A library that cannot start on a device with room, or on none, is broken: no smaller batch would help."""
    teacher = busy_teacher(failures=1, error=RuntimeError(said))
    with pytest.raises(RuntimeError, match=said.split(": ")[1]):
        teacher.capture([make_row(16, seed=1)], positions_per_batch=160)


@pytest.mark.parametrize(
    "said",
    [
        *(f"CUDA error: {library}_STATUS_NOT_INITIALIZED" for library in ("CUBLAS", "CUDNN", "CUSOLVER", "CUSPARSE")),
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
        "NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1016, please report a bug to PyTorch.",
    ],
)
def test_a_library_that_does_not_say_why_wants_memory_where_little_is_free(said):
    assert is_out_of_memory(RuntimeError(said), bytes_free=lambda: LITTLE_BYTES)
    assert not is_out_of_memory(RuntimeError(said), bytes_free=lambda: LITTLE_BYTES + 1)
    assert not is_out_of_memory(RuntimeError(said), bytes_free=lambda: None)


@pytest.mark.parametrize(
    "said",
    [*(f"{library}_STATUS_ALLOC_FAILED" for library in ("CUBLAS", "CUSOLVER", "CUSPARSE")), "CUFFT_ALLOC_FAILED"],
)
def test_a_library_that_could_not_allocate_wants_memory(said):
    assert is_out_of_memory(RuntimeError(f"CUDA error: {said}"), bytes_free=lambda: 2**40)


def test_calibration_halves_its_batches_too_and_goes_without_a_row_that_never_fits():
    kind = HeadSketch(6, 8, 0.1, VOCABULARY, 64)
    rows = [make_row(80, seed=99), *(make_row(16, seed=seed) for seed in range(10))]
    little, plenty = (
        Teacher.of(model, targets=StoredTargets(kind), layout="documents", pad_id=0)
        for model in (little_memory_model(), tiny_model(vocabulary=VOCABULARY))
    )
    little.prepare(rows, positions_per_batch=160, longest=80)
    assert little.batches_halved == 3
    plenty.prepare(rows[1:], positions_per_batch=32, longest=80)
    np.testing.assert_allclose(little.kind.basis.mean_D, plenty.kind.basis.mean_D, atol=1e-5)


def test_rows_whose_logits_are_not_finite_get_a_problem():
    model = tiny_model(vocabulary=VOCABULARY, tied=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = torch.nan
    healthy, sick = make_row(10, seed=1), make_row(10, seed=2)
    healthy.input_ids_S[healthy.input_ids_S == 7] = 8
    sick.input_ids_S[6] = 7
    results = make_teacher(model).capture([healthy, sick], positions_per_batch=4096)
    assert results[0].problem is None
    assert (
        results[1].problem == "the teacher's logits are not finite at 9 of 9 positions"
    )  # NaN reaches earlier tokens as 0 x NaN


@given(st.lists(st.integers(2, 60), min_size=1, max_size=40), st.integers(1, 300))
def test_batches_hold_every_row_once_within_the_budget(lengths, budget):
    rows = [make_row(length, seed=index) for index, length in enumerate(lengths)]
    batches = length_sorted_batches(rows, positions_per_batch=budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(rows[index].length for index in batch) <= budget


def test_batches_do_not_depend_on_the_order_of_rows():
    rows = [make_row(length, seed=index) for index, length in enumerate([5, 9, 5, 30, 9, 2])]
    names = [[rows[i].row_id for i in batch] for batch in length_sorted_batches(rows, positions_per_batch=20)]
    turned = rows[::-1]
    assert names == [
        [turned[i].row_id for i in batch] for batch in length_sorted_batches(turned, positions_per_batch=20)
    ]


def test_a_soft_cap_on_scores_is_never_left_out(tmp_path):
    """sdpa would: its logits differ, and no figure of a cache would show it."""
    config = Gemma2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, attn_logit_softcapping=0.5, query_pre_attn_scalar=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        sdpa, eager = (
            Gemma2ForCausalLM.from_pretrained(tmp_path, attn_implementation=name)(ids).logits
            for name in ("sdpa", "eager")
        )
        assert not torch.allclose(sdpa, eager, atol=1e-5)  # else this test could not fail
        assert torch.equal(load_causal_lm(str(tmp_path))(ids).logits, eager)
    with pytest.raises(ModelError, match="which sdpa leaves out; set attention to eager"):
        load_causal_lm(str(tmp_path), attention="sdpa")
