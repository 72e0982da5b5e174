"""Agent attention: a few agent tokens read all keys, and every query reads the agents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Literal, cast, get_args

from torch import Tensor

from diffaccel.errors import check_kinds
from diffaccel.kernels import dense_attention
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import Method, ScheduledMethod
from diffaccel.methods.full import FullAttn
from diffaccel.methods.grouped.base import GroupedMethod, check_least_tokens, counted_attention
from diffaccel.methods.grouped.cells import Cells, Groups, group_means, taken
from diffaccel.methods.inputs import (
    Attended,
    AttentionInputs,
    ExactTokens,
    Position,
    VisualTokens,
)
from diffaccel.methods.published import AGENTS
from diffaccel.methods.visual import VisualMethod
from diffaccel.methods.windows.base import Extent, check_extent, spread

if TYPE_CHECKING:
    from typing_extensions import Self

Agents = Literal["pool", "middle", "match"]


@dataclass(frozen=True, slots=True, repr=False)
class AgentAttn(GroupedMethod):
    """Attends through n agent tokens, n far below the N visual tokens, early in the schedule.

    Two chained attentions take the place of one: agents A gather what they would see, and every
    visual query reads the agents,

        gathered = softmax(A K^T s1) V
        output = softmax(Q A^T s2) gathered + shortcut * V

    with s1 the usual scale and s2 = s1 ** scale_power. Work grows with n * N: linearly where
    `most_agents` holds n. Approximate; constant values c give (1 + shortcut) * c.

    Beside text, visual queries attend agents and text in one softmax, the text exactly, and the
    logarithm of the tokens that an agent stands for is added to its scores. Text and condition
    queries run dense over everything.

    Where twice the agents are at least the visual tokens, or these are few (`least_tokens`),
    all runs dense, bit for bit, and the report says so.

    Sources: "Agent Attention: On the Integration of Softmax and Linear Attention" (Han, Ye, Han,
    Xia, Pan, Wan, Song, Huang, 2023, https://arxiv.org/abs/2312.08874) and its training-free
    AgentSD, whose schedule and constants are the defaults on U-Nets. AgentSD makes its agents by
    matching the inputs of a block, and merges the other tokens as well; here a method sees query,
    key and value alone, so that "match" compares keys, and merging is a method of its own:
    `AgentAttn(late=TokenMergingAttn(0.4))` merges after the agents' part of the schedule. The
    limit on the number of agents and the agents from middle tokens are own design.

    Args:
        cell: Tokens of the grid for one agent: one number for height and width, or (height,
            width), with each frame apart; or (frames, height, width). Any grid; cells at its end
            may be smaller. 4 makes 256 agents of 64 x 64 tokens, as AgentSD does.
        agents: What an agent is. "pool": the mean query of its cell. "middle": the query at the
            middle of its cell, for models that rotate queries by position: they reach a method
            rotated, and a mean of them loses the high frequencies. "match": the mean query of the
            tokens, of all the picture, whose keys resemble the middle token of a cell most.
            None: "middle" for the families with rotary positions, else "pool".
        most_agents: Cells grow evenly until there are no more agents than this; None for any
            number, with which work grows quadratically.
        start: Share of the schedule after which agents begin, 0 to 1. Followed where the method
            is attached to a model; without one, every call has agents. Image to image and
            refinement begin in the middle of a schedule: they have agents with stop=1.
        stop: Share of the schedule after which they end; 0.4 are the first 20 of 50 steps.
        scale_power: s2 = s1 ** scale_power, 0 to 1: 1 is the usual scale, with less every query
            reads fewer agents. None: 0.3 on U-Nets, as AgentSD, else 1.
        shortcut: Share of its own value that every visual query gets in addition, at least 0.
            None: 0.075 on U-Nets, as AgentSD, else 0.
        late: What runs in the rest of the schedule.
        least_tokens: Visual tokens below which all runs dense.
        dense_steps, dense_layers: As of `ScheduledMethod`.

    Example:
        >>> pipe.set_attn_processor(AgentAttn())
        >>> output = AgentAttn(cell=8).attend(query, key, value, TokenLayout.image(128, 96))
    """

    cell: Extent = 4
    agents: Agents | None = None
    most_agents: int | None = 256
    start: float = 0.0
    stop: float = 0.4
    scale_power: float | None = None
    shortcut: float | None = None
    late: Method = FullAttn()
    least_tokens: int = 1024

    def __post_init__(self) -> None:
        check_kinds(self)
        check_extent("cell", self.cell)
        if self.agents is not None and self.agents not in get_args(Agents):
            raise ValueError(
                f"agents must be None or one of {', '.join(get_args(Agents))}, got "
                f"agents={self.agents!r}"
            )
        if self.most_agents is not None and not _is_count(self.most_agents):
            raise ValueError(
                "most_agents must be None or an integer of at least 1, got "
                f"most_agents={self.most_agents!r}; None lets the cells alone decide"
            )
        if not 0.0 <= self.start < self.stop <= 1.0:
            raise ValueError(
                "start and stop must be shares of the schedule, 0 <= start < stop <= 1, got "
                f"start={self.start}, stop={self.stop}; 0 and 1 are the whole schedule"
            )
        if self.scale_power is not None and not 0.0 <= self.scale_power <= 1.0:
            raise ValueError(
                f"scale_power must be None or lie in 0 to 1, got scale_power={self.scale_power}; "
                "1 is the usual scale"
            )
        if self.shortcut is not None and not (isfinite(self.shortcut) and self.shortcut >= 0):
            raise ValueError(
                f"shortcut must be None or a number of at least 0, got shortcut={self.shortcut}"
            )
        if not isinstance(self.late, Method) or isinstance(self.late, AgentAttn):
            raise TypeError(
                "late must be another attention method, got "
                f"{type(self.late).__name__}; pass an instance such as TokenMergingAttn()"
            )
        check_least_tokens(self.least_tokens)
        ScheduledMethod.__post_init__(self)

    def cells(self, grid: Grid) -> Cells:
        """The cells of a grid (frames, height, width), one for each agent."""
        return _cells(self.cell, self.most_agents, grid)

    def shape_reason(self, layout: TokenLayout) -> str:
        reason = self._why_no_agents(layout)
        return reason if reason and self.late.shape_reason(layout) else ""

    def schedule_reason(self, position: Position) -> str:
        if not self._is_late(position):
            return ScheduledMethod.schedule_reason(self, position)
        if self.late == FullAttn():
            return f"outside start={self.start} to stop={self.stop}"
        return ""  # `late` has a schedule of its own

    def visual_share(self, layout: TokenLayout) -> float:
        """Two products of n and N in place of one of N and N."""
        return 2 * self.cells(layout.grid).number / layout.visual.length

    def resolved(
        self, family: str, num_layers: int, expert: int = 0, steps: int | None = None
    ) -> Self:
        """Fills knobs that are None with what suits a model family."""
        method = Method.resolved(self, family, num_layers, expert, steps)
        unset = {
            knob: value
            for knob, value in AGENTS[family]._asdict().items()
            if getattr(method, knob) is None
        }
        late = self.late.resolved(family, num_layers, expert, steps)
        return replace(method, late=late, **unset)

    def compute(self, inputs: AttentionInputs, position: Position) -> Attended:
        if self._is_late(position):
            return self.late.run(inputs, position)
        reason = self._why_no_agents(inputs.layout)
        if reason:
            return Attended(inputs.dense(), 1.0, reason)
        return VisualMethod.compute(self, inputs, position)

    def grouped_attention(self, visual: VisualTokens, exact: ExactTokens) -> Tensor:
        query, key, value, scale = visual.query, visual.key, visual.value, visual.scale
        agents, counts = self._agents(visual)
        gathered = dense_attention(agents, key, value, scale=scale, key_padding_mask=visual.valid)
        power = 1.0 if self.scale_power is None else self.scale_power
        if exact.key.shape[1]:
            # One softmax has one scale, which is that of the text.
            agents = agents * scale ** (power - 1.0)
            output = counted_attention(query, agents, gathered, counts, exact, scale)
        else:
            output = dense_attention(
                query, agents, gathered, scale=scale**power,
                key_padding_mask=None if visual.valid is None else counts > 0,
            )  # fmt: skip
        return output + self.shortcut * value if self.shortcut else output

    def _why_no_agents(self, layout: TokenLayout) -> str:
        """Says why agents save no work on a layout, "" where they do."""
        if layout.visual is None:
            return "there are no visual tokens"
        tokens = layout.visual.length
        if tokens < self.least_tokens:
            return f"{tokens} visual tokens are below least_tokens={self.least_tokens}"
        agents = self.cells(layout.grid).number
        if 2 * agents >= tokens:
            return f"{agents} agents save no work on {tokens} visual tokens"
        return ""

    def _is_late(self, position: Position) -> bool:
        progress = position.progress
        return progress is not None and not self.start <= progress < self.stop

    def _agents(self, visual: VisualTokens) -> Groups:
        query, valid = visual.query, visual.valid
        cells = self.cells(visual.layout.grid)
        if self.agents == "middle":
            counts = cells.counts(valid, query.device)
            tokens = taken(query, cells.middles(valid, query.device))
            return Groups(tokens.masked_fill((counts == 0)[..., None, None], 0.0), counts)
        if self.agents == "match":
            matching = cells.matched(visual.key, valid)
            return group_means(query, matching.cell, cells.number, valid)
        return cells.means(query, valid)


@lru_cache(maxsize=64)
def _cells(cell: Extent, most_agents: int | None, grid: Grid) -> Cells:
    size = list(map(min, spread(cell, (1, 1, 1)), grid))
    cells = Cells(grid, cast(Grid, tuple(size)))
    while most_agents is not None and cells.number > most_agents:
        flat = [axis for axis in (1, 2) if size[axis] < grid[axis]]
        for axis in flat or [0]:
            size[axis] += 1
        cells = Cells(grid, cast(Grid, tuple(size)))
    return cells


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
