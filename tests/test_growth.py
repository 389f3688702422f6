"""benchmarks/growth.py: collectives read out of a program's text, and how chips are used."""

import pytest

from benchmarks.growth import KINDS, Layout, choose_at_once, choose_layout, read_collectives

# a loop of 8 around a loop of 36, as XLA:TPU writes them; numbers to check by hand
PROGRAM = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %sum = f32[]{:T(128)} add(%a, %b)
}

%layer_condition (p: (s32[], bf16[4,8])) -> pred[] {
  %limit.1 = s32[]{:T(128)} constant(36)
  %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %at.1 = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%at.1, %limit.1), direction=LT
}

%layer (p.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p.1 = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %shard = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%p.1), index=1
  %gathered = (bf16[4,8], bf16[64,8]) all-gather-start(%shard), replica_groups=[1,16]<=[16]
  %whole = bf16[64,8]{1,0} all-gather-done(%gathered)
  ROOT %out = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%at, %shard)
}

%all-reduce-scatter.3 (g: f32[64,8]) -> f32[4,8] {
  %g = f32[64,8]{1,0} parameter(0)
  %summed = f32[64,8]{1,0} all-reduce(%g), replica_groups=[1,16]<=[16], to_apply=%add
  ROOT %cut = f32[4,8]{1,0} dynamic-slice(%summed, %zero, %zero), dynamic_slice_sizes={4,8}
}

%batch_condition (q: (s32[], bf16[4,8])) -> pred[] {
  %limit.2 = s32[]{:T(128)} constant(8)
  %q = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %at.2 = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%at.2, %limit.2), direction=LT
}

%batch (q.1: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %q.1 = (s32[]{:T(128)}, bf16[4,8]{1,0}) parameter(0)
  %layers = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%q.1), condition=%layer_condition, body=%layer
  %grads = f32[64,8]{1,0} constant(0)
  %added = f32[4,8]{1,0} fusion(%grads), kind=kCustom, calls=%all-reduce-scatter.3
  ROOT %next = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%at.2, %shard)
}

ENTRY %main (x: bf16[4,8]) -> f32[2] {
  %x = bf16[4,8]{1,0} parameter(0)
  %start = (s32[]{:T(128)}, bf16[4,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, bf16[4,8]{1,0}) while(%start), condition=%batch_condition, body=%batch
  %losses = f32[2]{0} constant({1, 2})
  ROOT %mean = f32[2]{0} all-reduce(%losses), replica_groups={{0,1,2,3}}, to_apply=%add
}
"""


def test_collectives_are_counted_with_the_loops_around_them():
    gather, scatter, mean = read_collectives(PROGRAM)
    assert (gather.kind, gather.sent_bytes, gather.group, gather.trips) == (
        "all-gather", 4 * 8 * 2, 16, (8, 36)
    )  # fmt: skip
    assert gather.received(0) == 8 * 36 * 64 * 15  # from each of 15 others
    assert (scatter.kind, scatter.sent_bytes, scatter.trips) == ("reduce-scatter", 64 * 8 * 4, (8,))
    assert scatter.received(0) == 8 * 2048 * 15 / 16
    assert (mean.kind, mean.sent_bytes, mean.group, mean.trips) == ("all-reduce", 8, 4, ())
    assert mean.received(0) == 2 * 8 * 3 / 4


def test_a_loop_of_unknown_length_takes_the_programs_own():
    text = PROGRAM.replace("%limit.1 = s32[]{:T(128)} constant(36)", "")
    gather = read_collectives(text)[0]
    assert gather.trips == (8, 0)
    assert gather.received(100) == 8 * 100 * 64 * 15


@pytest.mark.parametrize(
    ("what", "chips", "heads", "least", "expected"),
    [
        ("vm_cpt", 16, 2, 1, (1, 8)),  # 128 rows over 16 chips: eight each
        ("vm_cpt", 128, 2, 1, (1, 1)),
        ("vm_cpt", 256, 2, 1, (2, 1)),  # a row each for 128 pairs of chips
        ("update", 64, 2, 1, (2, 1)),
        ("update", 128, 2, 1, None),  # 3B has two key/value heads to cut, and 32 prompts
        ("update", 128, 8, 4, (4, 1)),
    ],
)
def test_more_chips_than_rows_need_tensor_until_heads_run_out(what, chips, heads, least, expected):
    layout = choose_layout(KINDS[what], chips, heads, least)
    found = (layout.tensor, layout.micro_batches) if layout else None
    assert found == expected


def test_prompts_are_sampled_as_many_at_a_time_as_there_is_room_for():
    rollouts = KINDS["decode"]  # 384 prompts
    assert choose_layout(rollouts, 256, 2, 1) == Layout(256, 2, 3)  # 256 does not divide 384
    layout = Layout(16, 1, 24)
    assert choose_at_once(rollouts, layout, 100.0) == 96  # 16, 32, 48, 64, 96, 128, ...
    assert choose_at_once(rollouts, layout, 1e9) == 384
    assert choose_at_once(rollouts, layout, 3.0) == 16  # one a device; the table says "memory"
