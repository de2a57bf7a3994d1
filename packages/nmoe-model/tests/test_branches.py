"""Sequences that share their beginning, in one row, against each of them alone."""

import pytest
import torch
from nmoe.model.branches import Branches
from nmoe.model.cache import Cache

TOLERANCE = 1e-11
"""Of the largest state, in float64."""

KINDS = ("everything", "mla", "mla_swa_mtp", "sdpa", "sdpa_swa_mtp")


class Tree:
    """A row: token ids, positions and untils, written down by hand from nested lists of (tokens, children)."""

    def __init__(self, node):
        self.tokens, self.positions, self.untils, self.leaves = [], [], [], []
        self._add(node, 0, [])

    def _add(self, node, depth, path):
        tokens, children = node
        places = list(range(len(self.tokens), len(self.tokens) + len(tokens)))
        self.tokens += tokens
        self.positions += range(depth, depth + len(tokens))
        self.untils += [0] * len(tokens)
        path = path + places
        for child in children:
            self._add(child, depth + len(tokens), path)
        if not children:
            self.leaves.append(path)
        for place in places:
            self.untils[place] = len(self.tokens)


SMALL = ([3, 1, 4, 1, 5, 9, 2, 6], [([5, 3], []), ([5], []), ([8, 9, 7, 9, 3], [])])
NESTED = ([2, 7, 1, 8, 2], [([8, 1], [([8], []), ([2, 8, 4], [])]), ([5, 9, 0], [([4, 5], []), ([2], [])])])
ALONE = ([1, 6, 1, 8, 0, 3, 3, 9, 8, 8], [])


def packed(trees, width):
    """Token ids and branches of rows of `width`, padded with token 0 that is seen by nobody else."""
    token, position, until = (torch.zeros(len(trees), width, dtype=torch.int64) for _ in range(3))
    until += width
    for row, tree in enumerate(trees):
        n = len(tree.tokens)
        token[row, :n], position[row, :n] = torch.tensor(tree.tokens), torch.tensor(tree.positions)
        until[row, :n] = torch.tensor(tree.untils)
    return token, position, until


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("trunk", [1, 3, 5])
def test_each_branch_is_the_sequence_alone(tiny, build, name, trunk):
    model = build(tiny(name)).eval()
    trees = [Tree(SMALL), Tree(NESTED), Tree(ALONE)]
    token_BS, position_BS, until_BS = packed(trees, 20)
    with torch.no_grad():
        found = model.hidden(token_BS, branches=Branches(position_BS, until_BS, trunk))
        assert found.shape == (3, 20, model.config.dim)
        for row, tree in enumerate(trees):
            for path in tree.leaves:
                alone = model.hidden(token_BS[row, path][None])[0]
                gap = (found[row, path] - alone).abs().max() / alone.abs().max()
                assert gap < TOLERANCE


def test_a_whole_trunk_is_the_plain_forward(tiny, build):
    model = build(tiny("everything")).eval()
    token_BS = torch.randint(19, (2, 11), generator=torch.Generator().manual_seed(1))
    position_BS = torch.arange(11).expand(2, 11).contiguous()
    with torch.no_grad():
        whole = torch.full((2, 11), 11)
        found = model.hidden(token_BS, branches=Branches(position_BS, whole, 11))
        expected = model.hidden(token_BS)
        start_BS = torch.tensor([[0] * 4 + [4] * 7, [0] * 11], dtype=torch.int32)
        apart = model.hidden(token_BS, branches=Branches(position_BS, whole, 11, start_BS))
        expected_apart = model.hidden(token_BS, document_start_BS=start_BS)
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()
    assert (apart - expected_apart).abs().max() < TOLERANCE * expected.abs().max()
    assert (apart - found).abs().max() > 1e-3


@pytest.mark.parametrize("wrong", ["until", "position", "trunk"])
def test_the_comparison_would_see_a_wrong_tree(tiny, build, wrong):
    model = build(tiny("mla")).eval()
    tree = Tree(SMALL)
    token_BS, position_BS, until_BS = packed([tree], 16)
    right = Branches(position_BS, until_BS, 8)
    mistaken = {
        "until": Branches(position_BS, torch.full_like(until_BS, 16), 8),  # branches see each other
        "position": Branches(torch.arange(16)[None], until_BS, 8),  # branches go on in place of beginning anew
        "trunk": Branches(position_BS, until_BS, 12),  # the second branch would be part of the first
    }[wrong]
    with torch.no_grad():
        gap = (model.hidden(token_BS, branches=right) - model.hidden(token_BS, branches=mistaken)).abs()
    assert gap[0, tree.leaves[-1]].max() > 1e-3


@pytest.mark.parametrize("name", KINDS)
def test_rows_that_are_taken_from_a_cache_go_on_as_their_own(tiny, build, name):
    """Left out, doubled, and in another order; what is added then is each row's own."""
    model = build(tiny(name)).eval()
    draw = torch.Generator().manual_seed(2)
    prompt_BS = torch.randint(19, (3, 6), generator=draw)
    row_N = torch.tensor([2, 0, 0, 2])
    more_NS = torch.randint(19, (4, 5), generator=draw)
    with torch.no_grad():
        cache = Cache(model.config.n_layers, 11)
        model.logits(prompt_BS, cache)
        cache.take(row_N)
        found = torch.cat([model.logits(step, cache) for step in more_NS.split([1, 3, 1], dim=1)], dim=1)
        expected = model.logits(torch.cat((prompt_BS[row_N], more_NS), dim=1))[:, 6:]
    assert (found - expected).abs().max() < TOLERANCE * expected.abs().max()


def test_padding_before_a_prompt_is_not_seen(tiny, build):
    """Prompts of several lengths end at one place: what stands before each is another document."""
    model = build(tiny("mla_swa_mtp")).eval()
    draw = torch.Generator().manual_seed(3)
    prompts, step = [torch.randint(19, (n,), generator=draw) for n in (7, 4, 1)], torch.tensor([[5], [6], [7]])
    padded = torch.stack([torch.cat((torch.zeros(7 - len(p), dtype=torch.int64), p)) for p in prompts])
    start_B1 = torch.tensor([[7 - len(p)] for p in prompts], dtype=torch.int32)
    with torch.no_grad():
        cache = Cache(model.config.n_layers, 8)
        first_BS = torch.minimum(start_B1, torch.arange(7, dtype=torch.int32))
        model.logits(padded, cache, document_start_BS=first_BS)
        found = model.logits(step, cache, document_start_BS=start_B1)
        for row, prompt in enumerate(prompts):
            expected = model.logits(torch.cat((prompt, step[row]))[None], last_only=True)[0]
            # The tables of RoPE are fp32, and the padding moves a prompt to other positions.
            assert (found[row] - expected).abs().max() < 1e-6 * expected.abs().max()
