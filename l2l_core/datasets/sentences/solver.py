"""Finds the object that a sentence refers to, from its words and the annotations, independent of the generator.

Every test has three outcomes: sure, impossible, or too close to call. A sentence has a solution only if one object
surely fits and no other possibly does. Look-alikes ("truck" for "car") and objects that a reader may overlook possibly
fit. Where objects of the kind cannot be counted, nothing fits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from l2l_core.core.verdict import Verdict
from l2l_core.datasets.sentences.layout import Layout
from l2l_core.datasets.sentences.query import Pick, Query, Relation, parse
from l2l_core.datasets.sentences.words import CARRIED, PEOPLE, SEATS, SITTERS, STANDING, Vocabulary

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]

# Margins. x, width: shares of the image's width; y, height: of its height; gaps: of its longer side.
VISIBLE = 0.004  # share of the image; a reader may overlook a smaller object (40 x 30 px of 640 x 480)
MANY = 10  # from so many objects of a kind on, annotators stop or draw a crowd (COCO: 10 to 15)
EDGE = 0.01  # what is ahead of another is so with its center and both ends
SIDE_LEAD = 0.10  # between centers: "left" leads clearly ...
RANK_LEAD = 0.04  # ... "leftmost" and "second from the left" surely
HALF_SURE = {"left": 0.40, "right": 0.40, "top": 0.30, "bottom": 0.30}  # "left" means a center left of this ...
HALF_POSSIBLE = 0.60  # ... and never one right of that; few people say "at the top" of what is above the middle
CORNER_SURE, CORNER_POSSIBLE = 0.30, 0.50  # likewise, on both axes
MIDDLE = (0.3, 0.7)  # where the center of the middle one of three is
ROW_SLOPE = 0.5  # most height of a row, as a share of its width, between the centers of its ends
ROW_OVERLAP = 0.5  # most overlap of neighbors in a row, as a share of the narrower one
IN_A_ROW = 3.0  # who counts from the left may leave out what is so many times smaller
SIZE_RATIO, CUT_RATIO = 1.5, 2.5  # "biggest": so many times as long, by mask and by box; as what is cut off
NEAR_RATIO = 1.25  # "closest": so many times as tall and as long as what is behind it ...
NEAR_LEAD = 0.04  # ... and standing so much lower
TOUCHES = 0.005  # from the border: what is cut off looks smaller than it is
BESIDE_SURE, BESIDE_POSSIBLE = 0.03, 0.12  # gap between neighbors
FAR = 0.35  # gap over which nothing is "left of" another
NEAREST_SURE, NEAREST_POSSIBLE = 0.08, 0.25  # gap of what is closest to an anchor, and of any rival
OVERLAP_LEVEL = 0.3  # "left of" is at the same height
COMPARABLE = 4.0  # neighbors differ less in length; nobody is "next to the fork"
INSIDE = 0.5  # what is covered by its neighbor's box that much is not beside it
TOUCHING_SURE, TOUCHING_POSSIBLE = 0.01, 0.05  # gap of "with" and "on"


def solve(sentence: str, layout: Layout, vocabulary: Vocabulary) -> int | None:
    """Index of the one object that a sentence refers to; None if it is none, several, or unclear.

    Raises ValueError if the sentence does not match the grammar of `query`.
    """
    return _Solver(layout, vocabulary).meant(parse(sentence, vocabulary)).only()


class _Solver:
    def __init__(self, layout: Layout, vocabulary: Vocabulary) -> None:
        self.layout, self.vocabulary = layout, vocabulary
        self.center, self.size = layout.center, layout.size
        self.length = np.sqrt(layout.area)  # of the mask, in image sides
        self.box_length = np.sqrt(self.size.prod(axis=1))

    def meant(self, query: Query) -> Verdict:
        members = self.members(query.kind)
        if query.count is not None and not members.sure.sum() == members.possible.sum() == query.count:
            return self.unclear(members)
        related = members
        for relation in query.relations:
            related = related & self.related(relation, members)
        found = related
        for pick in query.picks:
            # Readers may choose among all of the kind or among the related ones: both must lead to one object.
            first, second = (self.picked(pick, query.kind, group) for group in (members, related))
            found = Verdict(found.sure & first.sure & second.sure, found.possible & (first.possible | second.possible))
        return found

    def unclear(self, group: Verdict) -> Verdict:
        return Verdict(np.zeros_like(group.sure), group.possible)

    def members(self, kind: str) -> Verdict:
        """Objects of a kind."""
        same = self.layout.kind == kind
        alike = same | np.isin(self.layout.kind, self.vocabulary.lookalikes[kind])
        if (alike & self.layout.is_crowd).any() or same.sum() >= MANY:
            return self.unclear(Verdict(same, alike))
        return Verdict(same & (self.layout.area >= VISIBLE), alike)

    # --- picks ---

    def picked(self, pick: Pick, kind: str, group: Verdict) -> Verdict:
        match pick.name:
            case "side":
                return self.on_side(pick.side, group)
            case "corner":
                return self.in_corner(pick.side, group)
            case "rank":
                return self.ranked_from(pick.side, pick.rank, group)
            case "middle":
                return self.in_middle(group)
            case "size":
                return self.extreme_size(pick.side, group)
            case _:
                return self.extreme_depth(pick.side, kind, group)

    def ranked(self, group: Verdict, before: Bools, rank: int = 1) -> Verdict:
        """The rank-th of the group. before [N, N]: i is surely before j; neither way: too close to call."""
        surely = (before & group.sure[:, None]).sum(axis=0)
        maybe = ~before.T & group.possible[:, None]
        np.fill_diagonal(maybe, False)
        possibly = maybe.sum(axis=0)
        return Verdict(
            group.sure & (surely == rank - 1) & (possibly == rank - 1),
            group.possible & (surely <= rank - 1) & (possibly >= rank - 1),
        )

    def ahead(self, side: str, margin: float) -> Bools:
        """[N, N] i is surely farther on that side than j: its center by the margin, both its ends by EDGE."""
        center, low, high = self.toward(side)
        ends = [at[None, :] - at[:, None] >= EDGE for at in (low, high)]
        return np.asarray((center[None, :] - center[:, None] >= margin) & ends[0] & ends[1])

    def toward(self, side: str) -> tuple[Floats, Floats, Floats]:
        """Distances of center and both ends from a side of the image."""
        axis, far = int(side in ("top", "bottom")), side in ("right", "bottom")
        places = self.center[:, axis], self.layout.box[:, axis], self.layout.box[:, axis + 2]
        return (1 - places[0], 1 - places[2], 1 - places[1]) if far else places

    def on_side(self, side: str, group: Verdict) -> Verdict:
        at = self.toward(side)[0]
        return Verdict(at <= HALF_SURE[side], at <= HALF_POSSIBLE) & self.ranked(group, self.ahead(side, SIDE_LEAD))

    def in_corner(self, corner: str, group: Verdict) -> Verdict:
        vertical, horizontal = corner.split()
        at = np.maximum(self.toward(vertical)[0], self.toward(horizontal)[0])
        return group & Verdict(at <= CORNER_SURE, at <= CORNER_POSSIBLE)

    def ranked_from(self, side: str, rank: int, group: Verdict) -> Verdict:
        if rank > 1 and not self.is_row(group, horizontal=side in ("left", "right")):
            return self.unclear(group)
        return self.ranked(group, self.ahead(side, RANK_LEAD), rank)

    def is_row(self, group: Verdict, horizontal: bool) -> bool:
        """At least three objects, all surely of the group, of similar sizes, side by side (or in a column)."""
        if (group.sure != group.possible).any() or group.sure.sum() < 3:
            return False
        length, axis = self.length[group.sure], int(not horizontal)
        spread = np.ptp(self.center[group.sure], axis=0) * (self.layout.aspect, 1)
        is_level = spread[1 - axis] <= ROW_SLOPE * spread[axis]
        # Each overlaps itself, and no other one.
        apart = all((self.shared(i, axis)[group.sure] > ROW_OVERLAP).sum() == 1 for i in np.flatnonzero(group.sure))
        return bool(length.max() <= IN_A_ROW * length.min() and is_level and apart)

    def in_middle(self, group: Verdict) -> Verdict:
        """The second of three in a row, near the middle of the image."""
        if group.sure.sum() != 3 or not self.is_row(group, horizontal=True):
            return self.unclear(group)
        at = self.center[:, 0]
        found = self.ranked(group, self.ahead("left", RANK_LEAD), 2)
        return Verdict(found.sure & (at >= MIDDLE[0]) & (at <= MIDDLE[1]), found.possible)

    def extreme_size(self, size: str, group: Verdict) -> Verdict:
        bigger = self.longer(SIZE_RATIO) & (~self.is_cut() | self.longer(CUT_RATIO))
        if size == "big":
            return self.ranked(group, bigger)
        found = self.ranked(group, bigger.T)
        return Verdict(found.sure & ~self.is_cut(), found.possible)

    def longer(self, ratio: float) -> Bools:
        """[N, N] i is so many times as long as j, by mask and by box."""
        lengths = self.length, self.box_length
        first, second = (length[:, None] >= ratio * length[None, :] for length in lengths)
        return np.asarray(first & second)

    def is_cut(self) -> Bools:
        """[N] objects at the border of the image."""
        return np.asarray((self.layout.box[:, :2] < TOUCHES).any(1) | (self.layout.box[:, 2:] > 1 - TOUCHES).any(1))

    def extreme_depth(self, depth: str, kind: str, group: Verdict) -> Verdict:
        """Closest to the camera or farthest from it, of what stands on the ground."""
        if kind not in STANDING:
            return self.unclear(group)
        bottom, height = self.layout.box[:, 3], self.size[:, 1]
        lower = bottom[:, None] - bottom[None, :] >= NEAR_LEAD
        taller = height[:, None] >= NEAR_RATIO * height[None, :]
        closer = lower & taller & self.longer(NEAR_RATIO)
        return self.ranked(group, closer if depth == "near" else closer.T)

    # --- relations ---

    def related(self, relation: Relation, group: Verdict) -> Verdict:
        """Objects that are so related to the anchors; `closest to` compares those of the group."""
        anchors = self.anchors(relation.anchors)
        everything = np.ones(len(self.length), dtype=bool)
        if not anchors:
            return Verdict(~everything, everything)
        anchor = anchors[0]
        match relation.name:
            case "between":
                found = self.between(*anchors)
            case "next":
                found = self.next_to(anchor)
            case "nearest":
                found = self.nearest_to(anchor, group)
            case "with":
                found = self.with_carried(anchor)
            case "on":
                found = self.on_seat(anchor)
            case side:
                found = self.beyond(side, anchor)
        others = ~np.isin(np.arange(len(everything)), anchors)
        return found & Verdict(others, others)

    def anchors(self, kinds: tuple[str, ...]) -> list[int]:
        """The only object of each kind, or the only two if both kinds are the same; empty if there are others."""
        found = []
        for kind in sorted(set(kinds)):
            group = self.members(kind)
            if not group.sure.sum() == group.possible.sum() == kinds.count(kind):
                return []
            found += np.flatnonzero(group.sure).tolist()
        return found

    def beyond(self, side: str, anchor: int) -> Verdict:
        """To the left of an anchor: not inside it, at its height, not far away."""
        center, _, high = self.toward(side)
        own_center, own_low = center[anchor], self.toward(side)[1][anchor]
        sure = self.ahead(side, SIDE_LEAD)[:, anchor] & (high <= own_center) & (center <= own_low)
        level = self.shared(anchor, 1) >= OVERLAP_LEVEL
        near = self.layout.gap[anchor] <= FAR
        return Verdict(sure & level & near & self.comparable(anchor), center <= own_center + EDGE)

    def shared(self, anchor: int | np.int64, axis: int) -> Floats:
        """[N] overlap with an anchor along an axis, as a share of the shorter one."""
        low, high = self.layout.box[:, axis], self.layout.box[:, axis + 2]
        common = np.minimum(high, high[anchor]) - np.maximum(low, low[anchor])
        return np.asarray(np.maximum(common, 0) / np.maximum(np.minimum(high - low, (high - low)[anchor]), 1e-9))

    def comparable(self, anchor: int) -> Bools:
        ratio = np.maximum(self.box_length, 1e-9) / self.box_length[anchor]
        return np.asarray((ratio <= COMPARABLE) & (ratio >= 1 / COMPARABLE))

    def covered(self, anchor: int) -> Floats:
        """[N] overlap of the boxes, as a share of the smaller one."""
        return self.shared(anchor, 0) * self.shared(anchor, 1)

    def next_to(self, anchor: int) -> Verdict:
        gap, bottom = self.layout.gap[anchor], self.layout.box[:, 3]
        level = (self.shared(anchor, 1) >= INSIDE) & (np.abs(bottom - bottom[anchor]) <= SIDE_LEAD)
        beside = level & (self.covered(anchor) <= INSIDE) & self.comparable(anchor)
        return Verdict((gap <= BESIDE_SURE) & beside, gap <= BESIDE_POSSIBLE)

    def nearest_to(self, anchor: int, group: Verdict) -> Verdict:
        """What is near the anchor while all others of the group are three times as far."""
        gap = self.layout.gap[anchor]
        near = (gap <= NEAREST_SURE) & (self.covered(anchor) <= INSIDE) & self.comparable(anchor)
        found = self.ranked(group, near[:, None] & (gap > NEAREST_POSSIBLE)[None, :])
        return Verdict(found.sure & near, found.possible)

    def with_carried(self, anchor: int) -> Verdict:
        """People who touch what they can carry, which lies between their left and right ends or inside them."""
        can = np.isin(self.layout.kind, PEOPLE) & (self.layout.kind[anchor] in CARRIED)
        gap = self.layout.gap[anchor]
        sure = (gap <= TOUCHING_SURE) & (self.shared(anchor, 0) >= INSIDE)
        return Verdict(can & sure, can & (gap <= TOUCHING_POSSIBLE))

    def on_seat(self, anchor: int) -> Verdict:
        """What touches a couch, bed or bench and ends inside it."""
        left, top, right, bottom = self.layout.box[anchor]
        gap, low = self.layout.gap[anchor], self.layout.box[:, 3]
        inside = (self.center[:, 0] >= left) & (self.center[:, 0] <= right) & (self.shared(anchor, 0) >= 0.8)
        ends = (low >= top + 0.2 * (bottom - top)) & (low <= bottom - EDGE)
        smaller = self.box_length <= 0.8 * self.box_length[anchor]
        can = np.isin(self.layout.kind, sorted(SITTERS)) & (self.layout.kind[anchor] in SEATS)
        return Verdict(can & (gap <= TOUCHING_SURE) & inside & ends & smaller, gap <= TOUCHING_POSSIBLE)

    def between(self, first: int, second: int) -> Verdict:
        """Side by side between two anchors, from left to right."""
        if self.center[first, 0] > self.center[second, 0]:
            first, second = second, first
        low, high = self.layout.box[:, 0], self.layout.box[:, 2]
        at = self.center[:, 0]
        sure = (at >= high[first]) & (at <= low[second]) & (low >= at[first]) & (high <= at[second])
        for anchor in (first, second):
            sure &= (self.shared(anchor, 1) >= INSIDE) & self.comparable(anchor)
            sure &= self.layout.gap[anchor] <= FAR
        return Verdict(sure, (at >= at[first] - EDGE) & (at <= at[second] + EDGE))
