"""Several judges, or several wordings of one, that vote on every pair."""

from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from speciarl.judge.base import RUNGS, Judge, Pair, Verdict
from speciarl.judge.settings import VOTES
from speciarl.judge.tally import Tally


def winner(votes: Sequence[int], vote: str) -> int:
    """The category that `votes`, at least one, make: the lower one wherever two would do.

    majority: the most frequent; of equally frequent ones the lowest. median: the middle one in
    order; of two in the middle the lower.
    """
    if vote == "median":
        return sorted(votes)[(len(votes) - 1) // 2]
    counts = Counter(votes)
    return min(counts, key=lambda category: (-counts[category], category))


class PanelJudge:
    """Asks every member about every pair.

    A member's fault leaves its vote out; a pair is a fault only where fewer than half of the
    members have a vote. `probabilities` of a verdict are the shares of the votes, its `source` is
    that of the members if they agree on it, else the kind of vote. Members that share the rollout
    engine's device wake and sleep one after the other.
    """

    def __init__(self, members: Sequence[Judge], vote: str) -> None:
        """Raises ValueError for fewer than two members or an unknown vote."""
        if len(members) < 2 or vote not in VOTES:
            raise ValueError(
                f"a panel of {len(members)} with vote {vote!r}: needs two members or more, and "
                f"a vote of {', '.join(VOTES)}"
            )
        self.members = tuple(members)
        self.vote = vote
        self.identity = self._identity()
        self.concurrent = all(member.concurrent for member in members)
        self.counts = Tally()

    def check(self, truths: Iterable[str]) -> None:
        """Asks every member."""
        known = list(truths)
        for member in self.members:
            member.check(known)
        self.identity = self._identity()  # rules know the truths from here on

    def _identity(self) -> str:
        return f"{self.vote}({'; '.join(member.identity for member in self.members)})"

    def grade(self, pairs: Sequence[Pair]) -> list[Verdict]:
        """One verdict per pair, in order."""
        if self.concurrent:
            with ThreadPoolExecutor(len(self.members)) as pool:
                answers = list(pool.map(lambda member: member.grade(pairs), self.members))
        else:
            answers = [self._in_turn(member, pairs) for member in self.members]
        return [self._verdict(ballots) for ballots in zip(*answers, strict=True)]

    @staticmethod
    def _in_turn(member: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
        member.wake()
        verdicts = member.grade(pairs)
        if not member.concurrent:
            member.sleep()
        return verdicts

    def _verdict(self, ballots: Sequence[Verdict]) -> Verdict:
        votes = [ballot.category for ballot in ballots if ballot.category is not None]
        self.counts.add("pairs")
        if 2 * len(votes) < len(ballots):
            self.counts.add("faults")
            return next(ballot for ballot in ballots if ballot.category is None)
        category = winner(votes, self.vote)
        shares = tuple(votes.count(code) / len(votes) for code in range(RUNGS))
        self.counts.add("votes")
        self.counts.add("agreement", shares[category])
        sources = {ballot.source for ballot in ballots if ballot.category is not None}
        source = sources.pop() if len(sources) == 1 else self.vote
        return Verdict(category, source, None, shares)

    def tally(self) -> dict[str, float]:
        """The members' counters added up, the panel's own over them."""
        total = Tally()
        for member in self.members:
            for name, amount in member.tally().items():
                total.add(name, amount)
        return {**total.snapshot(), **self.counts.snapshot()}

    def sleep(self) -> None:
        """Every member."""
        for member in self.members:
            member.sleep()

    def wake(self) -> None:
        """Those that share no device; the others wake for their turn."""
        for member in self.members:
            if member.concurrent:
                member.wake()

    def close(self) -> None:
        """Every member."""
        for member in self.members:
            member.close()
