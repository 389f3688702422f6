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
    config.scenes.count = 36000
    config.scenes.width = 168  # px; 3:2 like CLEVR_v1.0, 6 x 4 cells of 28 px, no padded window
    config.scenes.height = 112
    config.scenes.min_objects = 3
    config.scenes.max_objects = 5

    config.lone = ConfigDict()  # one object filling the picture, as -M policies show values
    config.lone.count = 6000
    config.lone.side = 56  # px
    config.lone.shown_share = 0.5  # of a -M policy's values

    config.model = model = ConfigDict()
    model.vocab_size = 784
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

    config.optimizer = ConfigDict({"b2": 0.98, "weight_decay": 0.05})
    config.save_every = 250
    config.log_every = 25

    config.perception = ConfigDict()
    config.perception.steps = 6000
    config.perception.scenes = 64  # pictures a step
    config.perception.lone = 48
    config.perception.learning_rate = 2e-3
    config.perception.warmup_steps = 100
    config.perception.visual_rms = 0.5  # what the visual tokens are scaled to afterwards

    # rows, questions a row, tokens of the policy, tokens of a question, pictures in the policy
    config.shapes = ConfigDict(
        {
            "caption": (1, 64, 16, 80, 0),
            "existence": (1, 64, 16, 112, 0),
            "text": (1, 64, 16, 48, 0),
            "filter": (1, 64, 16, 184, 0),
            "policy_1": (16, 4, 48, 112, 1),
            "policy_2": (16, 4, 72, 124, 2),
            "policy_3": (8, 8, 128, 140, 4),
            "policy_4": (6, 8, 248, 156, 8),
            "policy_5": (4, 8, 456, 172, 16),
            "policy_6": (3, 8, 840, 180, 32),
            "recite_1": (32, 4, 48, 36, 1),
            "recite_2": (32, 4, 72, 36, 2),
            "recite_3": (12, 12, 128, 36, 4),
            "recite_4": (6, 24, 248, 36, 8),
            "recite_5": (4, 32, 456, 36, 16),
            "recite_6": (2, 48, 840, 36, 32),
        }
    )
    # the smallest example of each part of a chain of thought comes first: one section to look up,
    # one object to compare; sections stand in any order so that they are found by their numbers
    # and not by where they stand; see docs/nano_base.md for what happens without
    config.reading = make_leg(
        9000,
        3e-3,
        # until (share of the leg), shares of TASKS in steps, depths, -M share, share with sections
        # in any order
        (0.08, (0.35, 0.05, 0.04, 0.0, 0.36, 0.2), (1,), 0.0, 0.0),
        (0.2, (0.1, 0.03, 0.05, 0.15, 0.45, 0.22), (1, 2, 3), 0.2, 0.8),
        (0.5, (0.04, 0.02, 0.07, 0.25, 0.42, 0.2), (2, 2, 4, 5, 6), 0.3, 0.6),
        (0.7, (0.04, 0.02, 0.07, 0.5, 0.22, 0.15), (2, 2, 4, 5, 6), 0.4, 0.3),
        (1.0, (0.05, 0.02, 0.06, 0.68, 0.09, 0.1), (2, 4, 4, 6), 0.45, 0.15),
    )
    config.joint = make_leg(
        0,
        3e-4,
        (1.0, (0.2, 0.05, 0.03, 0.67, 0.05, 0.0), (2, 4), 0.45, 0.15),
    )
    return config


def make_leg(steps: int, learning_rate: float, *phases: tuple) -> ConfigDict:
    """A leg of the language model's training."""
    leg = ConfigDict()
    leg.steps = steps
    leg.learning_rate = learning_rate
    leg.warmup_steps = 50
    leg.phases = tuple(
        ConfigDict(
            {
                "until": until,
                "shares": shares,
                "depths": depths,
                "shown": shown,
                "shuffled": shuffled,
            }
        )
        for until, shares, depths, shown, shuffled in phases
    )
    return leg
