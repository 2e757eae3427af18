"""JSON arrays: elements of any kind come whole, what is broken costs itself."""

import json
import random
import tracemalloc

import pytest

from openllama.data import arrays, formats
from openllama.data.arrays import elements
from openllama.data.documents import Damage
from openllama.data.lines import Unreadable

from .reading import array, texts, write

MANY = [{"text": f"document {i}: }}, {{ [", "parts": [{"n": i}, {"n": [{}]}]} for i in range(4000)]


@pytest.mark.parametrize(
    "right, wrong",
    [
        ('"document 9:', "document 9:"),
        ('{ [", "parts": [{"n": 9', '{ [, "parts": [{"n": 9'),
        ('{"text": "document 9:', '"text": "document 9:'),
        ('{"text": "document 9:', '[{"text": "document 9:'),
        ('[{"n": 9}, {"n": [{}]}]}', '[{"n": 9}, {"n": [{}]}]'),
        ('[{"n": 9}, {"n": [{}]}]}', '[{"n": 9}, {"n": [{}]}'),
        ('[{"n": 9}, {"n": [{}]}]}', '[{"n": 9}, {"n": [{}]}]}]'),
        ('[{"n": 9}, {"n": [{}]}]}', '[{"n": 9}, {"n": [{}]}]}}'),
        ('[{"n": 9}, {"n": [{}]}]}, ', '[{"n": 9}, {"n": [{}]}]} '),
        ('[{"n": 9}, {"n": [{}]}]}', '[{"n": 9}, {"n": [{'),
        ("document 9:", 'document "9:'),
        ("document 9:", 'document "9":'),
        ('document 9: }, { ["', 'document 9: }, { [\\"'),
    ],
)
def test_a_broken_record_of_an_array_costs_no_more_than_its_neighbour_behind(tmp_path, right, wrong):
    data = json.dumps(MANY).replace(right, wrong, 1).encode()
    path = tmp_path / "a.json"
    path.write_bytes(data)
    damage = Damage()
    found, all_texts = texts(path, damage=damage), [r["text"] for r in MANY]
    assert set(all_texts) - set(found) <= set(all_texts[9:11]) and found[-1] == all_texts[-1]
    assert damage.counts


def values(found):
    """What elements hold, however they came."""
    return [json.loads(data) if isinstance(data, bytes) else data for _, data in found]


@pytest.mark.parametrize("longest", [1 << 14, 1 << 30])
def test_what_an_unclosed_list_has_swallowed_is_found(longest):
    """All that follows could be of it: that shows at the end of the file, or of what memory may hold."""
    broken = json.dumps(MANY).replace('{"n": [{}]}]}', '{"n": 5}', 1).encode()
    found = values(elements(broken[1:], iter([]), longest))
    assert found[0].reason == "not JSON" and found[1 - len(MANY) :] == MANY[1:]


def test_elements_of_any_length_and_depth_come_whole():
    """Up to ten times what the parser tries at once, of every kind, in pieces of any length."""
    draw = random.Random(4)
    deep = json.loads('{"a": [' * 40 + "1" + "]}" * 40)
    kinds = (1, -2.5e10, '\U0001f600\\"}, {', None, True, [], [[]], {}, deep, {'}, {"a': "é"})
    wanted = [
        {"n": i, "text": 'é}, {"\\' * int(10 ** draw.uniform(0, 4.4)), "more": draw.choice(kinds)}
        for i in range(200)
    ] + list(kinds)
    for indent in (None, 1):
        data = json.dumps(wanted, ensure_ascii=False, indent=indent).encode()[1:]
        for size in (977, 1 << 16, len(data)):
            pieces = (data[i : i + size] for i in range(0, len(data), size))
            assert values(elements(b"", pieces)) == wanted


def test_an_element_that_is_too_long_is_passed_over_undivided():
    long = {"list": [{"text": "}, {"}] * 20_000}
    data = json.dumps([{"text": "a"}, long, {"text": "c"}]).encode()
    pieces = (data[i : i + 5000] for i in range(1, len(data), 5000))
    first, middle, last = values(elements(b"", pieces, 100_000))
    assert (first, last) == ({"text": "a"}, {"text": "c"}) and middle.reason == "record too long"


def test_an_array_without_its_end_gives_all_whole_records(tmp_path):
    damage = Damage()
    assert texts(write(tmp_path / "a.json", array(MANY)[:-1]), damage=damage) == [r["text"] for r in MANY]
    assert damage.counts == {"truncated JSON array": 1}


@pytest.mark.parametrize(
    "piece",
    [
        b'{"":[{},' * 100,
        b'{"":[{},' * 1000 + b'"" ""',
        b"[" * 100,
        b'{"a":"b}, ' * 100,
        b'},{"' * 100,
        b'"":"",' * 100,
        b'{"a":[{"a":1},{"a":2},' * 100,
    ],
    ids=lambda piece: f"{piece[:10].decode()}{len(piece)}",
)
def test_hostile_arrays_take_linear_time(piece, monkeypatch):
    """No byte is followed more than some times over, and the parser tries little behind each break."""
    followed = tried = 0
    follow, decoded = arrays._Lexer.follow, arrays._decoded

    def counted(self, text, at):
        nonlocal followed
        end, mark = follow(self, text, at)
        followed += end - at
        return end, mark

    def counted_window(window):
        nonlocal tried
        tried += len(window)
        return decoded(window)

    monkeypatch.setattr(arrays._Lexer, "follow", counted)
    monkeypatch.setattr(arrays, "_decoded", counted_window)
    monkeypatch.setattr(arrays, "READ", 1 << 10)
    monkeypatch.setattr(arrays, "WINDOW_LEAST", 1 << 4)
    size, longest = 1 << 17, 1 << 13
    found = list(elements(b"", (piece for _ in range(size // len(piece))), longest))
    assert isinstance(found[-1][1], Unreadable)
    assert followed < 4 * (size + longest) and tried < 4 * (size + longest)


def test_a_string_of_escapes_takes_little_memory(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "' + b"\\n" * 4_000_000 + b'"}]')
    tracemalloc.start()
    ((_, record),) = formats.json_values(path, lambda _: None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(record) > 8_000_000 and peak < 6 * len(record)  # it was 70 times as much
