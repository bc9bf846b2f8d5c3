"""The check that no run leaves an error in the host's log."""

from __future__ import annotations

import host_log

LORA = "[ERROR] ERROR lora diffusion_model.x shape '[320, 768]' is invalid"


def test_only_new_lines_are_looked_at(tmp_path):
    log = tmp_path / "host.log"
    log.write_text("[INFO] got prompt\nERROR lora a\n")
    assert host_log.new_lines(log) == ["[INFO] got prompt", "ERROR lora a"]
    with log.open("a") as file:
        file.write("later\n")
    assert host_log.new_lines(log) == ["later"]


def test_an_error_is_one_of_whatever_kind():
    lines = ["[INFO] got prompt", LORA, "\x1b[31m[ERROR]\x1b[0m no such model"]
    assert host_log.errors(lines) == lines[1:]
