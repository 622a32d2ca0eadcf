"""Copies of an identity are told from restarts and from messages that were held up."""

from autotune.service.identities import Clash, Identities

WINDOW_S = 9.0


class Watch:
    """Sightings at times of the test's choice."""

    def __init__(self) -> None:
        self.now = 0.0
        self.identities = Identities(window_s=WINDOW_S, now_s=lambda: self.now)

    def sight(self, names: str, *, every_s: float = 1.0) -> list[Clash | None]:
        found = []
        for name in names:
            self.now += every_s
            found.append(self.identities.sight("a-1", name, f"10.0.0.{ord(name) - 96}"))
        return found


def test_two_that_speak_in_turns_are_a_clash_that_names_both_and_when_it_began() -> None:
    *before, clash = Watch().sight("ababa")
    assert before == [None] * 4
    assert clash == Clash(addresses=("10.0.0.1", "10.0.0.2"), since_s=3.0)


def test_three_copies_are_a_clash_too() -> None:
    assert Watch().sight("abcabca")[-1] is not None


def test_one_that_starts_again_and_again_is_none() -> None:
    assert Watch().sight("aaabbbcccddd") == [None] * 12


def test_an_old_message_held_up_on_its_way_is_none() -> None:
    assert Watch().sight("aaababbbbbb") == [None] * 11


def test_one_heard_of_after_a_long_silence_is_none() -> None:
    assert Watch().sight("ababab", every_s=WINDOW_S + 1) == [None] * 6


def test_agents_do_not_mix() -> None:
    watch = Identities(window_s=WINDOW_S, now_s=lambda: 0.0)
    assert [watch.sight(f"a-{n % 2}", str(n % 2), "::1") for n in range(8)] == [None] * 8


def test_after_a_clash_was_told_the_watch_begins_anew() -> None:
    watch = Watch()
    watch.sight("ababa")
    assert watch.sight("baba") == [None] * 4
    assert watch.sight("b") != [None]
