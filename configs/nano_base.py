"""Train the nano base model from nothing on two CPU cores.

    python -m trimpi_jax.train --config configs/nano_base.py --workdir /some/folder

Renders scenes, trains a small tokenizer, trains the model on captions, existence questions and
fresh random policies in context, and leaves a Hugging Face folder in `workdir/final`.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.name = "nano_base"
    config.kind = "nano_base"
    config.seed = 0
    config.dtype = "float32"
    config.init_dir = ""  # a Hugging Face folder of the same architecture to go on from

    config.scenes = ConfigDict()
    config.scenes.count = 24000
    config.scenes.width = 168  # px; 3:2 like CLEVR_v1.0, 6 x 4 cells of 28 px, no padded window
    config.scenes.height = 112
    config.scenes.min_objects = 3
    config.scenes.max_objects = 5

    config.model = model = ConfigDict()
    model.vocab_size = 704
    model.tokenizer_documents = 3000
    model.width = 128
    model.depth = 4
    model.heads = 4
    model.kv_heads = 2
    model.head_width = 32
    model.mlp_width = 384
    model.rope_theta = 10000.0
    model.mrope_section = (4, 6, 6)
    model.vision_width = 128
    model.vision_depth = 4
    model.vision_heads = 4
    model.vision_mlp_width = 256
    model.window_size = 56  # px: 2 x 2 merged cells
    model.full_attention_blocks = (1, 3)
    model.min_pixels = 28 * 28
    model.max_pixels = 168 * 112

    config.train = train = ConfigDict()
    train.steps = 3000
    train.rows = 64  # captions and existence questions
    train.policy_rows = 32
    train.token_buckets = (84, 112, 224, 328)
    train.windows = 6
    train.learning_rate = 2e-3
    train.warmup_steps = 100
    train.b2 = 0.98
    train.weight_decay = 0.05
    train.save_every = 250
    train.log_every = 25
    # until (share of the run), shares of caption / existence / policy steps, policy depths
    train.phases = tuple(
        ConfigDict({"until": until, "shares": shares, "depths": depths, "max_objects": 10})
        for until, shares, depths in (
            (0.35, (0.7, 0.0, 0.3), (1,)),
            (0.65, (0.45, 0.05, 0.5), (1, 2)),
            (1.0, (0.3, 0.05, 0.65), (2,)),
        )
    )
    return config
