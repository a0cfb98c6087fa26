"""Conditioning datasets in the dataloader's config: who belongs to whom."""

import pytest
from dataset_cases import IMAGE, TEXT, load_entries, only, refused_entries

MASKS = {
    "id": "masks",
    "type": "local",
    "dataset_type": "conditioning",
    "conditioning_type": "mask",
    "instance_data_dir": "datasets/masks",
}
DOGS = {"id": "dogs", "type": "local", "instance_data_dir": "datasets/dogs"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("cats", "masks"),
    [
        ({"conditioning_data": "masks"}, {}),
        ({"conditioning_data": ["masks"]}, {}),
        ({}, {"source_dataset_id": "cats"}),
        ({"conditioning_data": "masks"}, {"source_dataset_id": "cats"}),
        # a kind makes a dataset a conditioning one by itself
        ({"conditioning_data": "masks"}, {"dataset_type": None}),
    ],
)
def test_either_side_names_the_other(cats, masks):
    data = load_entries([IMAGE | cats, MASKS | masks, TEXT])
    assert [image.id for image in data.images] == ["cats"]
    (found,) = data.conditions("cats")
    assert (found.id, found.is_mask, found.copies_crops) == ("masks", True, True)
    assert [str(each.instance_data_dir) for each in data.folders] == [
        "datasets/cats",
        "datasets/masks",
    ]


def test_sizes_are_the_sources_and_captions_are_none():
    sizes = {
        "resolution": 512, "resolution_type": "pixel_area", "minimum_image_size": 300,
        "maximum_image_size": 900, "target_downsample_size": 700,
    }  # fmt: skip
    small = DOGS | {"resolution": 768, "conditioning_data": "masks"}
    entries = [IMAGE | sizes | {"conditioning_data": "masks"}, small]
    entries.append(MASKS | {"resolution": 64, "conditioning_type": "reference_loose"})
    data = load_entries([*entries, TEXT], caption_strategy="textfile", instance_prompt="a cat")
    (of_cats,), (of_dogs,) = data.conditions("cats"), data.conditions("dogs")
    assert {name: getattr(of_cats, name) for name in sizes} == sizes
    assert (of_dogs.resolution, of_dogs.maximum_image_size) == (768, None)
    assert of_cats.caption_strategy is None and of_cats.instance_prompt is None
    assert not of_cats.copies_crops and not of_cats.is_mask
    assert [each.id for each in data.folders] == ["cats", "dogs", "masks"]


def test_a_mask_and_references_may_belong_to_one_dataset_in_the_files_order():
    references = [
        MASKS | {"id": id, "conditioning_type": kind, "source_dataset_id": "cats"}
        for id, kind in (("b", "reference_strict"), ("a", "reference_loose"))
    ]
    entries = [references[0], MASKS | {"source_dataset_id": "cats"}, IMAGE, references[1], TEXT]
    assert [each.id for each in load_entries(entries).conditions("cats")] == ["b", "masks", "a"]


def test_every_link_that_leads_nowhere_is_named_at_once():
    problems = refused_entries(
        [
            IMAGE | {"conditioning_data": ["mask", "dogs"]},
            DOGS,
            MASKS,
            MASKS | {"id": "more", "source_dataset_id": "masks"},
            MASKS | {"id": "others", "source_dataset_id": "cat"},
            TEXT,
        ]
    )
    for parts in (
        ('dataset "cats"', '"mask"', "no dataset with this id", 'did you mean "masks"'),
        ('dataset "cats"', '"dogs"', "no conditioning dataset"),
        ('dataset "masks"', "belongs to no image dataset", '"source_dataset_id"'),
        ('dataset "more"', '"masks"', "is a conditioning dataset itself"),
        ('dataset "others"', '"cat"', "no enabled image dataset", 'did you mean "cats"'),
    ):
        assert any(all(part in problem for part in parts) for problem in problems), (
            parts,
            problems,
        )
    assert len(problems) == 5


def test_two_masks_for_one_dataset_are_refused():
    masks = [
        MASKS | {"source_dataset_id": "cats"},
        MASKS | {"id": "b", "source_dataset_id": "cats"},
    ]
    only(refused_entries([IMAGE, *masks, TEXT]), 'dataset "cats": has several masks', '"b"')


def test_its_kind_is_known_and_its_keys_belong_to_it():
    only(
        refused_entries([IMAGE, MASKS | {"conditioning_type": "controlnet"}, TEXT]),
        '"conditioning_type" is "controlnet": not implemented yet',
    )
    only(
        refused_entries([IMAGE | {"source_dataset_id": "masks"}, TEXT]),
        '"source_dataset_id" is a key of entries whose "dataset_type" is "conditioning"',
    )
