"""What a user types for a class, and the index that it means."""

import pytest

from utils.class_names import load_imagenet_class_names, resolve_class
from utils.cli import UserError

GARMENTS = ["T-shirt/top", "Trouser", "Dress", "Shirt", "Ankle boot", "Shirt"]


@pytest.fixture(scope="module")
def imagenet():
    return load_imagenet_class_names()


def test_imagenet_names_are_in_index_order(imagenet):
    assert len(imagenet) == len(set(imagenet)) == 1000
    known = {0: "tench", 1: "goldfish", 207: "golden retriever", 281: "tabby", 388: "giant panda", 999: "toilet tissue"}
    assert {index: imagenet[index] for index in known} == known


@pytest.mark.parametrize("text, index", [
    ("207", 207), (207, 207), (" 0 ", 0), ("golden retriever", 207), ("Golden Retriever", 207), ("golden_retriever", 207),
    ("golden-retriever", 207), ("giant  panda", 388), ("golden retr", 207), ("hen", 8)])
def test_index_name_and_unique_part(imagenet, text, index):
    assert resolve_class(text, imagenet) == index      # "hen" is also a part of other names: the exact one wins


def test_every_imagenet_name_means_itself(imagenet):
    assert [resolve_class(name, imagenet) for name in imagenet] == list(range(1000))


def test_names_of_another_set():
    assert resolve_class("t shirt", GARMENTS) == 0
    assert resolve_class("boot", GARMENTS) == 4


@pytest.mark.parametrize("text", ["1000", "-1"])
def test_index_out_of_range(imagenet, text):
    with pytest.raises(UserError, match=f"class {text} is out of range; wanted 0 to 999"):
        resolve_class(text, imagenet)


def test_ambiguous_part_lists_its_matches(imagenet):
    with pytest.raises(UserError, match=r"'panda' is ambiguous: lesser panda \(387\), giant panda \(388\); give a name"):
        resolve_class("panda", imagenet)
    with pytest.raises(UserError, match="\\([0-9]+\\), \\.\\.\\.; give"):
        resolve_class("e", imagenet)


def test_name_that_two_classes_have_is_ambiguous():
    with pytest.raises(UserError, match=r"Shirt \(3\), Shirt \(5\)"):
        resolve_class("shirt", GARMENTS)


def test_case_decides_only_between_names_that_differ_in_nothing_else(imagenet):
    assert resolve_class("Cardigan", imagenet) == 264 and resolve_class("cardigan", imagenet) == 474
    with pytest.raises(UserError, match="ambiguous"):
        resolve_class("CARDIGAN", imagenet)


def test_misspelt_name_is_told_with_near_ones(imagenet):
    with pytest.raises(UserError, match=r"unknown: golden retriever \(207\)"):
        resolve_class("goldn retreiver", imagenet)


@pytest.mark.parametrize("text", ["", "qqqqqq", "2.5"])
def test_nothing_near(imagenet, text):
    with pytest.raises(UserError, match="is unknown: no name is near it"):
        resolve_class(text, imagenet)


@pytest.mark.parametrize("text", ["blå", "bla", "BLÅBÄR", "blabar", "bla\u030aba\u0308r"])
def test_accents_do_not_matter(text):
    assert resolve_class(text, ["smultron", "blåbär", "hallon"]) == 1


def test_unknown_name_of_a_small_set_is_told_with_all_names(imagenet):
    with pytest.raises(UserError, match=r"'hat' is unknown: T-shirt/top \(0\), .*, Shirt \(5\); give"):
        resolve_class("hat", GARMENTS)
    with pytest.raises(UserError, match=r"unknown: c0 \(0\).* c19 \(19\); give"):
        resolve_class("hat", [f"c{index}" for index in range(20)])
    with pytest.raises(UserError, match="no name is near it"):
        resolve_class("hat", [f"c{index}" for index in range(21)])
