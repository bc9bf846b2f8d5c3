"""Names of files as people write them: folders, dates, letters of all languages, and never out of the folder."""

import time

import pytest
from palimpsest.nodes import files, names

NOW = time.struct_time((2031, 4, 5, 6, 7, 9, 5, 95, 0))


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("%year%-%month%-%day% %hour%%minute%%second%", "2031-04-05 060709"),
        ("%date:yyyy-MM-dd%/cat", "2031-04-05/cat"),
        ("%date:yy/M/d h.m.s%", "31/4/5 6.7.9"),
        ("%date:hh_mm_ss%", "06_07_09"),
        ("100% cat and 50% dog", "100% cat and 50% dog"),
        ("cat %", "cat %"),
    ],
)
def test_the_date_is_filled_in_as_the_host_and_its_editor_do(given, name):
    assert names.dated(given, NOW) == name


@pytest.mark.parametrize("given", ["%seed%", "a/%KSampler.seed%", "%Empty Latent.width%", "%date%", "%date:%"])
def test_a_word_that_stands_for_nothing_is_refused_by_name(given):
    with pytest.raises(ValueError, match=r"the name has '%[^']+%' in it, which stands for nothing here: write %year%"):
        files.safe_name(given, "file", "my cat")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("sub/dir/name", "sub/dir/name"),
        ("sub\\dir\\name", "sub/dir/name"),
        ("/sub//name/", "sub/name"),
        ("./sub/../name", "sub/name"),
        ("C:\\Users\\cat", "C/Users/cat"),
        ("\\\\server\\share\\cat", "server/share/cat"),
        ("~/cat", "cat"),
        (". ./cat. /..", "cat"),
        ("cat\0\n\t\x7f", "cat"),
        ("cat\ud800\udfff", "cat"),
        ("cat\u202e\u200b", "cat"),
        ("हिन्दी", "हिन्दी"),
        ("cafe\u0301", "café"),
        ("猫" * 80, "猫" * 66),
        ("𠮷" * 80, "𠮷" * 50),
        ("a" * 79 + " b", "a" * 79),
    ],
)  # fmt: skip
def test_a_name_keeps_its_folders_and_its_letters(given, name):
    found = files.safe_name(given, "file", "my cat")
    assert found == name
    assert all(len(part.encode()) <= names.BYTES for part in found.split("/"))


@pytest.mark.parametrize("given", ["", "..", "///", " . ", "\0", "\ud800" * 500, "_-_", "sub/---", "a" * 0 + "\u0301"])
def test_a_name_without_letters_is_refused_and_quoted_in_short(given):
    with pytest.raises(ValueError, match="has no letters or digits: write a name such as 'my cat'") as error:
        files.safe_name(given, "file", "my cat")
    assert len(str(error.value)) < 500
    str(error.value).encode()


def test_folders_are_not_endless():
    assert files.safe_name("a/b/c/d", "file", "my cat") == "a/b/c/d"
    with pytest.raises(ValueError, match="goes 4 folders deep, the limit is 3"):
        files.safe_name("a/b/c/d/e", "file", "my cat")


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "models" / "inside").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "models" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "also models").symlink_to(tmp_path / "models")
    assert names.within(tmp_path / "also models", "inside/cat") == tmp_path / "also models" / "inside" / "cat"
    with pytest.raises(ValueError, match="'out/cat' lies outside of models"):
        names.within(tmp_path / "models", "out/cat")


def test_a_number_is_free_when_nothing_at_all_has_it(tmp_path):
    (tmp_path / "cat_1").touch()
    (tmp_path / "cat_2").mkdir()
    (tmp_path / "cat_3").symlink_to(tmp_path / "gone")
    names.unfinished(tmp_path / "cat_4").mkdir()
    (tmp_path / "dog_5").touch()
    found = names.first_free(lambda number: [tmp_path / f"cat_{number}", tmp_path / f"dog_{number}"])
    assert found == [tmp_path / "cat_6", tmp_path / "dog_6"]
