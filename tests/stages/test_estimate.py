"""Products and bytes by hand, the compiler's refusal read, what does not fit told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import nano
from tests.tiny_model import tiny_config
from trimpi_jax import preflight
from trimpi_jax.models import vlm
from trimpi_jax.models.releases import RELEASES
from trimpi_jax.sharding import make_mesh
from trimpi_jax.stages.estimate import (
    CHIPS,
    Estimate,
    allotted_bytes,
    bytes_per_chip,
    chip_of,
    count_flops,
    decode_parameters,
    estimate,
    parameter_count,
    read_refusal,
)
from trimpi_jax.stages.programs import batch_shapes, place_weights, run_programs

X, W = jnp.ones((3, 4)), jnp.ones((4, 5))
ONE = 2 * 3 * 4 * 5  # of X W


EMPTY = Estimate("x", 0, 0, 0, 0, flops=0.0, moved_bytes=0.0, compile_s=0.0, contributors=[])


def flops(function, *arguments, loop_steps=1):
    return count_flops(jax.make_jaxpr(function)(*arguments).jaxpr, loop_steps)


def test_products_by_hand():
    assert flops(jnp.dot, X, W) == ONE
    batched = lambda a, b: jnp.einsum("bij,bjk->bik", a, b)  # noqa: E731
    assert flops(batched, jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5))) == 7 * ONE
    # d/dX sum (X W)^2 needs X W and (2 X W) W^T
    assert flops(jax.grad(lambda x: jnp.sum((x @ W) ** 2)), X) == 2 * ONE
    assert flops(lambda x: jnp.sin(x) + x, X) == 0


def test_products_of_loops_and_choices():
    square = jnp.eye(3)

    def scanned(x):
        return jax.lax.scan(lambda carry, _: (square @ carry, None), x, None, length=6)[0]

    def repeated(x):
        return jax.lax.while_loop(lambda c: c[0] < 9, lambda c: (c[0] + 1, square @ c[1]), (0, x))

    def chosen(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: square @ y, lambda y: square @ (square @ y), x)

    one = 2 * 3 * 3 * 4
    assert flops(scanned, X) == 6 * one
    assert flops(repeated, X, loop_steps=50) == 50 * one
    assert flops(chosen, X) == 2 * one  # the dearer branch
    # recomputation is work: forward, forward again, and one product for the gradient
    kept = lambda x: jnp.sum(jax.checkpoint(lambda y: jnp.sin(y @ W))(x))  # noqa: E731
    assert flops(jax.grad(kept), X) == 3 * ONE - flops(kept, X) * 0


def test_scanned_layers_count_as_often_as_they_run(config):
    """XLA's own analysis counts the body of a loop once; the floor must not."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    counts = {}
    for loop in ("scan", "unrolled"):
        model = dataclasses.replace(tiny_config(), layer_loop=loop)
        programs = run_programs(config, model, mesh, model.text.vocab_size)
        step = next(program for program in programs if program.name == "vm_cpt/step 144")
        with jax.set_mesh(mesh):
            traced = step.function.trace(*step.arguments)
        counts[loop] = count_flops(traced.jaxpr.jaxpr, 0)
        if loop == "scan":
            once = traced.lower().cost_analysis()["flops"]
    assert model.text.depth > 1 and counts["scan"] == counts["unrolled"]
    assert once < counts["scan"]


def test_a_row_a_device_at_a_time(config):
    """micro_batches 0: one pass for each row of a device, whatever their number."""
    config = config.copy_and_resolve_references()
    config.vm_cpt.micro_batches = 0
    for devices in (1, 4):
        mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
        programs = run_programs(config, tiny_config(), mesh, 704)
        step = next(program for program in programs if program.name == "vm_cpt/step 144")
        assert step.weight_reads == 2 * config.vm_cpt.batch // devices


def test_bytes_of_a_chip():
    mesh = make_mesh(2, 2, 2)
    cut = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    tree = {
        "weight": jax.ShapeDtypeStruct((6, 10), jnp.bfloat16, sharding=cut),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert bytes_per_chip(tree) == 3 * 5 * 2 + 4


def test_the_sizes_of_the_releases():
    # totals of the published checkpoints (tied heads counted once)
    totals = {"3b": 3_754_622_976, "7b": 8_292_166_656, "72b": 73_410_777_344}
    for size, total in totals.items():
        assert parameter_count(vlm.param_shapes(RELEASES[size])) == total
    # 3B: 2.775e9 in the layers' matrices, and the head
    assert decode_parameters(RELEASES["3b"]) == pytest.approx(2.775e9 + 2048 * 151936, rel=1e-3)


def test_the_chip_is_known_by_its_name():
    @dataclasses.dataclass
    class Device:
        device_kind: str

    assert chip_of(Device("TPU v5 lite")) is CHIPS["TPU v5 lite"]
    assert chip_of(Device("TPU v5")) is CHIPS["TPU v5"]
    assert chip_of(Device("NVIDIA H100 80GB HBM3")) is CHIPS["H100"]
    assert chip_of(Device("cpu")) is None


def test_a_refusal_is_read():
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space"
        " hbm. Used 31.50G of 15.75G hbm. Exceeded hbm capacity by 15.75G.\n"
        "Largest program allocations in hbm:\n"
        '  1. Size: 12.00G\n     Operator: op_name="jit(step)/dot_general"\n     Shape: f32[1,2]\n'
        "  2. Size: 512.00M\n     Shape: bf16[5,6]{1,0}\n"
    )
    largest, temporaries = read_refusal(message, argument_bytes=2**30)
    assert temporaries == int(30.5 * 2**30)
    assert largest == "the compiler's largest: 12.00G jit(step)/dot_general; 512.00M bf16[5,6]{1,0}"
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO"
        " temporaries (32.05G) exceeds available HBM (31.25G)."
    )
    assert read_refusal(message, argument_bytes=2**30)[1] == int(31.05 * 2**30)


def test_what_the_compiler_allots():
    @dataclasses.dataclass
    class Stats:
        argument_size_in_bytes: int = 100
        output_size_in_bytes: int = 90
        alias_size_in_bytes: int = 80
        temp_size_in_bytes: int = 60
        peak_memory_in_bytes: int = 150
        generated_code_size_in_bytes: int = 3

    assert allotted_bytes(Stats(), "tpu") == {"argument": 100, "output": 10, "temp": 40 + 3}
    assert allotted_bytes(Stats(), "gpu") == {"argument": 100, "output": 10, "temp": 60 + 3}
    unknown = dataclasses.replace(Stats(), peak_memory_in_bytes=0)
    assert allotted_bytes(unknown, "tpu")["temp"] == 60 + 3


def test_the_floor_is_the_slower_of_work_and_memory():
    chip = dataclasses.replace(CHIPS["H100"], peak_flops=100.0, peak_bandwidth=10.0)
    one = Estimate("x", 1, 2, 3, 4, flops=200.0, moved_bytes=30.0, compile_s=0.0, contributors=[])
    assert one.floor_s(chip) == 3.0 and one.total_bytes == 10
    assert dataclasses.replace(one, flops=500.0).floor_s(chip) == 5.0


@pytest.fixture(scope="module")
def config():
    config = nano.get_config("method=trimpi_poro_grpo")
    config.layer_loop = "scan"
    config.eval.rows = 96
    return config


def test_a_program_is_what_the_compiler_says_and_what_the_stage_holds(config):
    model, mesh = tiny_config(), make_mesh(4, 2, 1)
    with jax.set_mesh(mesh):
        programs = {p.name: p for p in run_programs(config, model, mesh, model.text.vocab_size)}
        score = programs["rl/score 92"]
        found, outputs = estimate(score, model, mesh, "float32")
        small, _ = estimate(score, model, mesh, "float32", memory=5e5)
        kept, _ = estimate(score, model, mesh, "float32", compiles=False)
    assert outputs.shape == (8, 16, 92)
    assert outputs.sharding.shard_shape(outputs.shape) == (
        1,
        16,
        92,
    )  # groups stay where they were
    weights = bytes_per_chip(place_weights(vlm.param_shapes(model), model, mesh))
    # the stage holds two moments, the reference and the copy for decoding beside the weights
    assert 3 * weights < found.beside_bytes < 4.05 * weights
    assert weights < found.argument_bytes < 2 * weights + 2e6 and found.temporary_bytes > 0
    # the parts of a row's forward pass: 2 FLOPs a weight and token, attention and ViT above
    text = model.text
    matrices = decode_parameters(model) - text.width * text.vocab_size
    assert found.flops > 2 * matrices * 8 * (56 + 16 * 91) / 8
    assert small.compile_s == 0 and "keeps more than a chip has" in small.refused
    assert kept.total_bytes == small.total_bytes
    assert kept.argument_bytes == pytest.approx(found.argument_bytes, rel=0.05)
    assert dict(found.contributors)["reference"] == pytest.approx(weights, rel=0.01)


def test_every_program_of_the_run_is_there_with_its_buckets(config):
    model, mesh = tiny_config(), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    names = [p.name for p in run_programs(config, model, mesh, model.text.vocab_size)]
    stages = {name.split("/")[0] for name in names}
    assert stages == {"evaluate", *config.stages}
    for bucket in config.row_buckets:
        assert f"vm_cpt/step {bucket}" in names
    views = ("rl/free", "rl/aware", "evaluate/free", "evaluate/aware")
    assert {f"{view} decode" for view in views} <= set(names)
    assert {"rl/aware policy 104", "rl/aware prefill 56", "rl/free prefill 56"} <= set(names)
    assert {"rl/decode weights", "rl/score 92", "rl/update 92"} <= set(names)
    assert len(names) == len(set(names))
    step = next(p for p in run_programs(config, model, mesh, 704) if p.name == "cot_sft/step 144")
    assert "lora_a" in step.arguments[0].params["language"]["layers"]["q"]


def test_rows_that_do_not_divide_are_told(config):
    mesh = make_mesh(8, 1, 1)
    with pytest.raises(ValueError, match="9 rows are not divisible by the 8 devices"):
        batch_shapes(tiny_config(), mesh, 9, 16, 0)


def test_what_is_large_is_told():
    parts = [("optimizer state", 3 * 2**30), ("weights", 2**30), ("temporaries", 2**20)]
    one = Estimate("rl/update 768", 2**32, 0, 2**20, 0, 1.0, 1.0, 0.0, parts, refused="9G dot")
    text = preflight.explain(one, 2**31)
    assert "rl/update 768 needs 4.00 GiB of 2.00 GiB a chip: optimizer state 3.00 GiB" in text
    assert "weights 1.00 GiB" in text and "9G dot" in text
    lines = preflight.table([one], CHIPS["H100"], 2**31)
    assert len({len(line) for line in lines}) == 1 and "200 %" in lines[1]


def test_what_takes_less_is_told(config):
    def told(name):
        return preflight.remedies(config, dataclasses.replace(EMPTY, program=name))

    config = config.copy_and_resolve_references()
    config.vm_cpt.moment_dtype = config.rl.moment_dtype = "float32"
    config.remat, config.vm_cpt.micro_batches = "none", 2
    assert told("vm_cpt/step 144")[:3] == [
        "--config.vm_cpt.micro_batches=0 (one row a device at a time)",
        "--config.remat=full",
        "--config.vm_cpt.moment_dtype=bfloat16",
    ]
    config.remat, config.rl.moment_dtype, config.rl.micro_batches = "full", "bfloat16", 0
    assert told("rl/update 92")[-1] == "more chips"
    assert not any("rl.m" in text or "remat" in text for text in told("rl/update 92"))
    assert not any("moment" in text for text in told("cot_sft/step 144"))
    assert "sample_prompts than" in told("rl/aware decode")[0]
    assert "eval.rows than 96" in told("evaluate/free decode")[0]


@pytest.mark.parametrize("topology", ["v5p", "v5p:", "v5p-8", "2x2", "v5p:2x2x", "tpu:2x2"])
def test_a_topology_has_a_generation_and_chips(topology):
    with pytest.raises(SystemExit, match="GENERATION:CHIPS"):
        preflight.prepare_topology_environment(topology)


def test_a_model_is_a_size_or_a_folder(tmp_path):
    assert preflight.find_model("3b")[0] == RELEASES["3b"]
    assert preflight.find_model("assets/nano")[0].text.width == 128
    with pytest.raises(ValueError, match=r"neither a folder .* nor one of"):
        preflight.find_model(str(tmp_path))
    np.testing.assert_equal(preflight.size(3 * 2**20), "3.00 MiB")
