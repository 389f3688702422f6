"""A small `clevr` data set on disk, as tensorflow-datasets prepares it, without TensorFlow.

tensorflow-datasets encodes images with TensorFlow only, so the records are put together here: its
own serializer for the whole, PNG bytes where its Image feature would put them.
"""

from pathlib import Path

import numpy as np

from data_pipelines.clevr.scene import Scene


def prepare(data_dir: Path, split: str, scenes: list[Scene], pictures: list[bytes]) -> None:
    """Write scenes and pictures as one split of the builder, version 3.1.0, ArrayRecord."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module
    from tensorflow_datasets.core import example_serializer, naming, splits

    builder = tfds.builder("clevr", data_dir=str(data_dir), file_format="array_record")
    features = builder.info.features
    folder = Path(builder.data_path)
    folder.mkdir(parents=True, exist_ok=True)
    template = naming.ShardedFileTemplate(
        data_dir=folder, dataset_name="clevr", split=split, filetype_suffix="array_record"
    )
    path = template.sharded_filepath(shard_index=0, num_shards=1)
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    objects = features["objects"].feature
    for scene, picture in zip(scenes, pictures, strict=True):
        columns = {
            "color": [objects["color"].str2int(o.color) for o in scene.objects],
            "material": [objects["material"].str2int(o.material) for o in scene.objects],
            "shape": [objects["shape"].str2int(o.shape) for o in scene.objects],
            "size": [objects["size"].str2int(o.size) for o in scene.objects],
            "rotation": [o.rotation for o in scene.objects],
            "3d_coords": [o.position for o in scene.objects],
            "pixel_coords": [o.pixel_coords for o in scene.objects],
        }
        labels = ("color", "material", "shape", "size")
        record = {
            "image": picture,
            "file_name": f"{scene.scene_id}.png".encode(),
            "objects": {
                name: np.array(values, np.int64 if name in labels else np.float32)
                for name, values in columns.items()
            },
            "question_answer": {"question": [b"how many?"], "answer": [b"3"]},
        }
        writer.write(serializer.serialize_example(record))
    writer.close()
    size = Path(path).stat().st_size
    info = splits.SplitInfo(
        name=split, shard_lengths=[len(scenes)], num_bytes=size, filename_template=template
    )
    known = [old for name, old in builder.info.splits.items() if name != split]
    builder.info.set_splits(splits.SplitDict([*known, info]))
    builder.info.write_to_directory(folder)
