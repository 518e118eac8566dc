"""Category codes: the ladder of specificity as int8, shared by judges, rewards and metrics.

The order is the ladder (SpeciaRL, section 3): W < A < G < S- < S < S+. Two codes stand outside it:
ABSENT (a rollout that could not be judged, or padding where group sizes differ) and FORMAT (a
completion without a parsable answer).
"""

ABSENT = -1
W = 0
A = 1
G = 2
S_MINUS = 3
S = 4
S_PLUS = 5
FORMAT = 6

CODES: tuple[int, ...] = (ABSENT, W, A, G, S_MINUS, S, S_PLUS, FORMAT)

NAMES: dict[int, str] = {
    ABSENT: "absent",
    W: "wrong",
    A: "abstain",
    G: "generic",
    S_MINUS: "less specific",
    S: "specific",
    S_PLUS: "more specific",
    FORMAT: "format",
}

# Points of the specificity metric, out of 4; wrong and malformed answers are left out of it.
SPECIFICITY: dict[int, int] = {A: 1, G: 2, S_MINUS: 3, S: 4, S_PLUS: 4}
