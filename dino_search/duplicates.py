"""Duplicates: which images of a collection are copies of each other, in groups, and which one to keep.

Images with equal bytes are one *content*, compared once: ten thousand equal files cost what one does. Pairs of contents
are found by the cosine of their copy vectors, decided, and grouped; then each group's files are listed.

Shapes: N contents, I images, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.calibration import DecisionRule
from dino_index.catalog import Catalog, ImageRow, SourceRow, bound_parts
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, count_images, find_collection, join_path
from dino_index.copy_decisions import Decision, Judgement, Verdict, judge
from dino_index.copy_descriptors import CopyDescriptor
from dino_index.duplicate_groups import CopyPairs, Linkage, NodeGroup, group_pairs
from dino_index.near_pairs import MAX_PARTNERS, near_pairs
from dino_search.copies import LocatedImage
from dino_search.duplicate_checks import FileOf, PairChecks, PairVerifier
from dino_search.duplicate_contents import Contents
from dino_search.duplicate_results import Duplicate, DuplicateGroup, Duplicates, Keep, PairList

Verdicts = Mapping[tuple[bytes, bytes], Verdict]
"""A person's decisions, by the two sha256 in ascending order."""

DEFAULT_COPY_SCORE = 0.95
"""Without a calibration."""
MAX_VERIFIED = 20_000
"""Pairs; each takes some hundredths of a second."""
_MAX_CHAIN_CHECKED = 64
# Pairs with a lower cosine than this are too many to list where they may still be uncertain.
_LOWEST_SCORE = 0.5
_ROWS_PER_FETCH = 8192


@dataclass(frozen=True, kw_only=True)
class CopyRule:
    """How a pair's score becomes a decision.

    decide: score -> (decision, estimated precision); a better score never gives a lesser decision.
    lowest_score: no lower one is decided `copy` or `uncertain`, so that such pairs need not be found.
    """

    decide: Callable[[float], tuple[Decision, float | None]]
    lowest_score: float


@dataclass(frozen=True, kw_only=True)
class DuplicateOptions:
    """What is looked for. min_score: leaves pairs with a lower score out of the list, and changes no group."""

    linkage: Linkage = "components"
    keep: Keep = "resolution"
    min_score: float | None = None
    ignore_same_folder: bool = False
    checked: bool = True
    """Read the files of copies, so that plain pages and frames of bursts are not taken for copies."""


def fixed_rule(copy_score: float) -> CopyRule:
    """Copies from `copy_score` on, and nothing uncertain. Raises ValueError."""
    if not 0 < copy_score <= 1:
        raise ValueError(f"the copy score must be above 0 and at most 1, found {copy_score}")
    return CopyRule(
        decide=lambda score: ("copy" if score >= copy_score else "different", None), lowest_score=copy_score
    )


def calibrated_rule(rule: DecisionRule) -> CopyRule:
    """Copies and uncertain pairs by estimated precision."""
    return CopyRule(decide=rule.decide, lowest_score=min(max(rule.uncertain_score, _LOWEST_SCORE), 1.0))


def find_duplicates(
    catalog: Catalog,
    name: str,
    options: DuplicateOptions,
    rule: CopyRule,
    *,
    descriptor: CopyDescriptor | None = None,
    verdicts: Verdicts | None = None,
    verifier: PairVerifier | None = None,
    on_progress: Callable[[float], None] = lambda done_frac: None,
) -> Duplicates:
    """The duplicates among a collection's readable images, as of one moment.

    verifier: decides pairs that the rule calls uncertain; None leaves them so.
    Raises CollectionNotFound, CatalogErrors.
    """
    with catalog.reading() as session:
        collection = find_collection(session, name)
        counts = count_images(session, collection)
        contents = Contents.load(session, collection, descriptor or CopyDescriptor(), options.ignore_same_folder)
    # Comparing may take long, and a database that is being read cannot tidy up behind its writers.
    search = _Search(contents, rule, verdicts or {}, on_progress)
    files_of = partial(_readable_files, catalog, collection)
    if verifier is not None:
        search.verify(verifier, descriptor or CopyDescriptor(), files_of, on_progress)
    if options.checked:
        search.look_into(PairChecks(files_of), on_progress)
    groups = search.groups(options.linkage)
    listed = search.listed(options.min_score)
    wanted = {image: node for group in groups for node in group.members for image in contents.images_of(node)}
    wanted |= {contents.first_image(node): node for pair in listed for node in pair[:2]}
    with catalog.reading() as session:
        known = _files(session, collection, sorted(wanted))
    # Without what another command has removed or replaced meanwhile.
    files = {image: file for image, file in known.items() if file.sha256 == contents.digest(wanted[image]).hex()}
    listed = [pair for pair in listed if all(contents.first_image(node) in files for node in pair[:2])]
    pairs = [
        (contents.first_image(left), contents.first_image(right), cosine, judged, verdict)
        for left, right, cosine, judged, verdict in listed
    ] + _identical_pairs(contents, files, options.min_score)
    done: list[DuplicateGroup] = []
    for group in groups:
        if sum(image in files for node in group.members for image in contents.images_of(node)) > 1:
            done.append(_with_files(len(done) + 1, group, contents, files, options.keep, search))
    return Duplicates(
        collection=collection.name,
        model=collection.model_name,
        images=counts["ok"],
        failed=counts["failed"],
        linkage=options.linkage,
        keep=options.keep,
        groups=done,
        remarks=search.remarks(),
        pairs=PairList(
            left_P=np.array([pair[0] for pair in pairs], np.int64),
            right_P=np.array([pair[1] for pair in pairs], np.int64),
            cosine_P=np.array([pair[2] for pair in pairs], np.float32),
            decisions=[pair[3:] for pair in pairs],
            names={image: (file.path, file.sha256) for image, file in files.items()},
        ),
    )


def _identical_pairs(
    contents: Contents, files: Mapping[int, _File], min_score: float | None
) -> list[tuple[int, int, float, Judgement, Verdict | None]]:
    """The first image of each content with all others of the same bytes."""
    if min_score is not None and min_score > 1:
        return []
    judged = Judgement(decision="copy", reason="identical", precision=None)
    return [
        (images[0], other, 1.0, judged, None)
        for node in contents.repeated().tolist()
        if len(images := [image for image in contents.images_of(node) if image in files]) > 1
        for other in images[1:]
    ]


_Listed = tuple[int, int, float, Judgement, Verdict | None]
"""Two contents, their cosine, what is said of them, and what a person said."""


class _Search:
    """Pairs of contents, decided."""

    def __init__(
        self, contents: Contents, rule: CopyRule, verdicts: Verdicts, on_progress: Callable[[float], None]
    ) -> None:
        self._contents = contents
        self._rule = rule
        nodes = contents.nodes_of(sorted({digest for pair in verdicts for digest in pair}))
        self._said: dict[tuple[int, int], Verdict] = {}
        for (one, other), verdict in verdicts.items():
            if one in nodes and other in nodes and one != other:
                left, right = sorted((nodes[one], nodes[other]))
                self._said[left, right] = verdict
        self._said_keys = np.array([left * len(contents) + right for left, right in self._said], np.int64)
        self._found = near_pairs(contents, rule.lowest_score, allowed=self._may_be_pairs, on_progress=on_progress)
        self._lowest_copy = _lowest_copy(rule)
        decided = [rule.decide(float(cosine)) for cosine in self._found.cosine_P.tolist()]
        self._judged = [
            Judgement(decision=decision, reason="score", precision=precision) for decision, precision in decided
        ]  # fmt: skip
        self._overruled: set[tuple[int, int]] = set()
        self._promoted: set[tuple[int, int]] = set()
        self._num_unverified = 0
        self._plain_N = np.zeros(len(contents), np.bool_)

    def verify(
        self, verifier: PairVerifier, descriptor: CopyDescriptor, files_of: FileOf, on_progress: Callable[[float], None]
    ) -> None:
        """Decides the pairs that their cosine leaves open, the best ones, by patches and pixels."""
        cosine_P = self._found.cosine_P
        is_open_P = np.array([judged.decision == "uncertain" for judged in self._judged], np.bool_)
        best = np.flatnonzero(is_open_P)[np.argsort(-cosine_P[is_open_P], kind="stable")]
        self._num_unverified = max(len(best) - MAX_VERIFIED, 0)
        chosen = np.sort(best[:MAX_VERIFIED])
        left_P, right_P = self._found.left_P[chosen], self._found.right_P[chosen]
        nodes = np.unique(np.concatenate([left_P, right_P]))
        biases_N = np.zeros(len(self._contents), np.float32)
        for begin in range(0, len(nodes), _ROWS_PER_FETCH):
            part = nodes[begin : begin + _ROWS_PER_FETCH]
            biases_N[part] = descriptor.biases(self._contents.rows(part))
        # A query may be either of the two: the pair is no more alike than it is from the side of the commoner one.
        likeness_P = cosine_P[chosen] - np.maximum(biases_N[left_P], biases_N[right_P])
        images = [
            (self._contents.first_image(left), self._contents.first_image(right))
            for left, right in zip(left_P.tolist(), right_P.tolist(), strict=True)
        ]
        decided = verifier.decide(images, likeness_P.tolist(), files_of, on_progress)
        for pair, left, right, decision in zip(
            chosen.tolist(), left_P.tolist(), right_P.tolist(), decided, strict=True
        ):
            if decision is not None and decision[0] == "copy":
                self._judged[pair] = Judgement(decision="copy", reason="score", precision=decision[1])
                self._promoted.add((left, right))

    def look_into(self, checks: PairChecks, on_progress: Callable[[float], None]) -> None:
        """Takes back what likeness alone should not decide: plain pages, frames of bursts."""
        copies = [pair for pair, judged in enumerate(self._judged) if judged.decision == "copy"]
        pairs = {pair: (int(self._found.left_P[pair]), int(self._found.right_P[pair])) for pair in copies}
        image_of = {node: self._contents.first_image(node) for nodes in pairs.values() for node in nodes}
        checks.read(list(image_of.values()), on_progress)
        for node, image_id in image_of.items():
            self._plain_N[node] = checks.is_plain(image_id)
        for pair, (left, right) in pairs.items():
            images = image_of[left], image_of[right]
            judged = judge(
                "copy", self._judged[pair].precision, verdict=None, same_bytes=False,
                is_burst=lambda images=images: checks.is_burst(*images),  # type: ignore[misc]
                is_unproven_plain=lambda images=images: checks.is_unproven_plain(*images),  # type: ignore[misc]
            )  # fmt: skip
            self._judged[pair] = judged
            if judged.decision != "copy":
                self._overruled.add((left, right))

    def groups(self, linkage: Linkage) -> list[NodeGroup]:
        """Groups of contents; one content by itself where several images have it."""
        copies = np.array([judged.decision == "copy" for judged in self._judged], np.bool_)
        joined = [pair for pair, verdict in self._said.items() if verdict == "copy"]
        left_P = np.concatenate([self._found.left_P[copies], np.array([pair[0] for pair in joined], np.int64)])
        right_P = np.concatenate([self._found.right_P[copies], np.array([pair[1] for pair in joined], np.int64)])
        # Before all others: a person said so.
        score_P = np.concatenate([self._found.cosine_P[copies], np.full(len(joined), 2, np.float32)])
        found = group_pairs(
            CopyPairs(
                num_nodes=len(self._contents),
                left_P=left_P,
                right_P=right_P,
                score_P=score_P,
                crowded_N=self._found.crowded_N,
                apart=frozenset(pair for pair, verdict in self._said.items() if verdict == "not_copy"),
            ),
            linkage,
            self._contents.scores,
            self._joined,
        )
        taken = {node for group in found for node in group.members}
        alone = [
            NodeGroup(members=(node,), centre=None, min_score=1.0, all_compared=True)
            for node in self._contents.repeated().tolist()
            if node not in taken
        ]
        return sorted(found + alone, key=lambda group: group.members)

    def listed(self, min_score: float | None) -> list[_Listed]:
        """Every pair that is a copy or may be one, or was judged by a person."""
        pairs: list[_Listed] = []
        for left, right, cosine, judged in zip(
            self._found.left_P.tolist(), self._found.right_P.tolist(), self._found.cosine_P.tolist(), self._judged,
            strict=True,
        ):  # fmt: skip
            if judged.decision != "different" or judged.similar:
                pairs.append((left, right, cosine, judged, None))
        for (left, right), verdict in sorted(self._said.items()):
            cosine = float(self._contents.scores(np.array([left]), np.array([right]))[0, 0])
            decided: Decision = "copy" if verdict == "copy" else "different"
            judged = Judgement(decision=decided, reason="verdict", precision=None)
            pairs.append((left, right, round(cosine, 6), judged, verdict))
        return [pair for pair in pairs if min_score is None or pair[2] >= min_score]

    def is_copy(self, left: int, right: int, score: float) -> bool:
        """What was decided of one pair of contents."""
        pair = min(left, right), max(left, right)
        if left == right or (verdict := self._said.get(pair)) == "copy":
            return True
        is_copy = self.decides_copy(score) or pair in self._promoted
        return verdict is None and is_copy and pair not in self._overruled

    def is_chained(self, group: NodeGroup) -> bool:
        """Whether it holds pairs that are no copies by themselves."""
        if len(group.members) > _MAX_CHAIN_CHECKED:
            return not self.decides_copy(group.min_score)
        members = np.array(group.members)
        scores_MM = self._contents.scores(members, members)
        return any(
            not self.is_copy(left, right, round(float(scores_MM[i, j]), 6))
            for i, left in enumerate(group.members)
            for j, right in enumerate(group.members[:i])
        )

    def decides_copy(self, score: float) -> bool:
        return self._rule.decide(score)[0] == "copy"

    def remarks(self) -> list[str]:
        remarks = []
        if self._num_unverified:
            remarks.append(
                f"{self._num_unverified:,} pairs stay uncertain without a closer look: the {MAX_VERIFIED:,} with the "
                "best cosines were verified"
            )
        num_crowded = int(self._found.crowded_N.sum())
        if not num_crowded:
            return remarks
        return [
            *remarks,
            f"{num_crowded:,} images are alike by the hundred: of their pairs only the best {MAX_PARTNERS} of each are "
            "listed, and what connects the groups, which are whole",
        ]

    def _joined(self, left_A: NDArray[np.int64], right_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which pairs that need not be listed are copies."""
        scores_AB = np.round(self._contents.scores(left_A, right_B), 6)
        copies_AB = scores_AB >= np.float32(self._lowest_copy)
        left_P, right_P = (side.ravel() for side in np.broadcast_arrays(left_A[:, None], right_B[None]))
        allowed_P = self._may_be_pairs(left_P, right_P) & ~self._plain_N[left_P] & ~self._plain_N[right_P]
        return np.asarray(copies_AB & allowed_P.reshape(copies_AB.shape), np.bool_)

    def _may_be_pairs(self, left_P: NDArray[np.int64], right_P: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Neither judged by a person, which is counted by itself, nor of one and the same folder."""
        allowed_P = np.ones(len(left_P), np.bool_)
        if len(self._said_keys):
            keys_P = np.minimum(left_P, right_P) * len(self._contents) + np.maximum(left_P, right_P)
            allowed_P &= ~np.isin(keys_P, self._said_keys)
        folder_N = self._contents.only_folder_N
        if folder_N is not None:
            allowed_P &= (folder_N[left_P] < 0) | (folder_N[left_P] != folder_N[right_P])
        return allowed_P


def _lowest_copy(rule: CopyRule) -> float:
    """The lowest score that is decided `copy`, to 6 decimals; above 1 where none is."""
    low, high = round(rule.lowest_score * 1e6), 1_000_001
    while low < high:
        middle = (low + high) // 2
        if rule.decide(middle / 1e6)[0] == "copy":
            high = middle
        else:
            low = middle + 1
    return low / 1e6


@dataclass(frozen=True, slots=True)
class _File:
    """What the catalog says of one image."""

    image_id: int
    path: str
    relative_path: str
    sha256: str
    size: int
    mtime_ns: int
    width: int
    height: int


def _readable_files(catalog: Catalog, collection: CollectionInfo, ids: Sequence[int]) -> dict[int, LocatedImage]:
    with catalog.reading() as session:
        files = _files(session, collection, list(ids))
    return {
        image: LocatedImage(decode_path(file.path), bytes.fromhex(file.sha256), file.width, file.height)
        for image, file in files.items()
    }


def _files(session: Session, collection: CollectionInfo, ids: list[int]) -> dict[int, _File]:
    found: dict[int, _File] = {}
    for part in bound_parts(ids):
        rows = session.execute(
            select(SourceRow.path, ImageRow)
            .join(SourceRow, SourceRow.id == ImageRow.source_id)
            .where(ImageRow.id.in_(part), ImageRow.collection_id == collection.id, ImageRow.status == "ok")
        )
        for source, row in rows:
            path = encode_path(join_path(decode_path(source), row.path))
            found[row.id] = _File(
                row.id, path, row.path, (row.sha256 or b"").hex(), row.size, row.mtime_ns, row.width or 0,
                row.height or 0,
            )  # fmt: skip
        session.expunge_all()
    return found


def _with_files(
    number: int, group: NodeGroup, contents: Contents, files: Mapping[int, _File], keep: Keep, search: _Search
) -> DuplicateGroup:
    """The group's files: the one to keep, then by score with it."""
    nodes: dict[str, int] = {}
    candidates: list[_File] = []
    for node in group.members:
        for image in contents.images_of(node):
            if image in files:
                candidates.append(files[image])
                nodes[files[image].sha256] = node
    kept = min(candidates, key=lambda file: _preference(file, keep))
    members = np.array(group.members)
    scores = contents.scores(np.array([nodes[kept.sha256]]), members)[0]
    score_of = dict(zip(group.members, np.round(scores, 6).tolist(), strict=True)) | {nodes[kept.sha256]: 1.0}
    listed = [
        Duplicate(
            path=file.path,
            image_id=file.image_id,
            keep=file is kept,
            score=score_of[nodes[file.sha256]],
            identical=file is not kept and file.sha256 == kept.sha256,
            direct=search.is_copy(nodes[kept.sha256], nodes[file.sha256], score_of[nodes[file.sha256]]),
            width=file.width,
            height=file.height,
            size=file.size,
            mtime_ns=file.mtime_ns,
            sha256=file.sha256,
            relative_path=file.relative_path,
        )
        for file in candidates
    ]
    listed.sort(key=lambda file: (not file.keep, not file.identical, -file.score, file.path))
    return DuplicateGroup(
        group=number,
        min_score=group.min_score,
        all_compared=group.all_compared,
        chained=search.is_chained(group),
        files=listed,
    )


def _preference(file: _File, keep: Keep) -> tuple[Any, ...]:
    """Sorts the file to keep first. After what was asked for: resolution, size, age, path."""
    usual = (-file.width * file.height, -file.size, file.mtime_ns, file.path)
    asked = {
        "resolution": (),
        "size": (-file.size,),
        "oldest": (file.mtime_ns,),
        "newest": (-file.mtime_ns,),
        "path": (file.path,),
    }
    return (*asked[keep], *usual)
