"""Agent attention: a few agent tokens read all keys, and every query reads the agents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from diffaccel.kernels import dense_attention
from diffaccel.layout import Grid, TokenLayout
from diffaccel.methods.base import DenseLayers, Method, check_schedule
from diffaccel.methods.exact_tokens import OtherKeys
from diffaccel.methods.full import FullAttn
from diffaccel.methods.grouped.base import GroupedMethod, check_least_tokens, counted_attention
from diffaccel.methods.grouped.cells import Cells, Groups, group_means, taken
from diffaccel.methods.published import AGENTS
from diffaccel.methods.windows.base import Extent, check_extent, spread

if TYPE_CHECKING:
    from typing import Self

Agents = Literal["pool", "middle", "match"]


@dataclass(frozen=True, slots=True)
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
        dense_steps: First denoising steps that run dense. None: as published, 0 without a model.
        dense_layers: Layers that run dense: a tuple of indices, or the number of first layers.
            None: as published, none without a model.

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
    dense_steps: int | None = None
    dense_layers: DenseLayers = None

    def __post_init__(self) -> None:
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
        check_schedule(self.dense_steps, self.dense_layers)

    def cells(self, grid: Grid) -> Cells:
        """The cells of a grid (frames, height, width), one for each agent."""
        size = list(map(min, spread(self.cell, (1, 1, 1)), grid))
        cells = Cells(grid, tuple(size))
        while self.most_agents is not None and cells.number > self.most_agents:
            flat = [axis for axis in (1, 2) if size[axis] < grid[axis]]
            for axis in flat or [0]:
                size[axis] += 1
            cells = Cells(grid, tuple(size))
        return cells

    def idle_reason(self, layout: TokenLayout) -> str:
        """Why a layout runs dense, "" where agents save work."""
        if layout.visual is None:
            return "there are no visual tokens"
        tokens = layout.visual.length
        if tokens < self.least_tokens:
            return f"{tokens} visual tokens are below least_tokens={self.least_tokens}"
        agents = self.cells(layout.grid).number
        if 2 * agents >= tokens:
            return f"{agents} agents save no work on {tokens} visual tokens"
        return ""

    def visual_share(self, layout: TokenLayout) -> float:
        """Two products of n and N in place of one of N and N."""
        return 2 * self.cells(layout.grid).number / layout.visual.length

    def dense_reason(self, layout: TokenLayout) -> str:
        """Why the method, or the one of the rest of the schedule, runs a layout dense."""
        return self.idle_reason(layout) or self.late.dense_reason(layout)

    def runs_dense(
        self,
        layer: int | None = None,
        step: int | None = None,
        progress: float | None = None,
    ) -> bool:
        """Whether the schedule makes this call dense; `late` has a schedule of its own."""
        if self._is_late(progress):
            return self.late == FullAttn()
        return Method.runs_dense(self, layer, step)

    def resolved(self, family: str, num_layers: int, expert: int = 0) -> Self:
        """Fills knobs that are None with what suits a model family."""
        method = Method.resolved(self, family, num_layers, expert)
        unset = {
            knob: value
            for knob, value in AGENTS[family]._asdict().items()
            if getattr(method, knob) is None
        }
        return replace(method, late=self.late.resolved(family, num_layers, expert), **unset)

    def attend_with_density(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        *,
        progress: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | float]:
        """As `Method.attend_with_density`; outside start to stop it is that of `late`."""
        attend = Method.attend_with_density
        if self._is_late(progress):
            return self.late.attend_with_density(
                query, key, value, layout, progress=progress, **options
            )
        return attend(self, query, key, value, layout, progress=progress, **options)

    def _is_late(self, progress: float | None) -> bool:
        return progress is not None and not self.start <= progress < self.stop

    def _attend_visual(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: TokenLayout,
        scale: float,
        valid: Tensor | None,
        others: OtherKeys,
    ) -> Tensor:
        agents, counts = self._agents(query, key, layout, valid)
        gathered = dense_attention(agents, key, value, scale=scale, key_padding_mask=valid)
        power = 1.0 if self.scale_power is None else self.scale_power
        if others.key.shape[1]:
            # One softmax has one scale, which is that of the text.
            agents = agents * scale ** (power - 1.0)
            output = counted_attention(query, agents, gathered, counts, others, scale)
        else:
            output = dense_attention(
                query, agents, gathered, scale=scale**power,
                key_padding_mask=None if valid is None else counts > 0,
            )  # fmt: skip
        return output + self.shortcut * value if self.shortcut else output

    def _agents(
        self, query: Tensor, key: Tensor, layout: TokenLayout, valid: Tensor | None
    ) -> Groups:
        cells = self.cells(layout.grid)
        if self.agents == "middle":
            counts = cells.counts(valid, query.device)
            tokens = taken(query, cells.middles(valid, query.device))
            return Groups(tokens.masked_fill((counts == 0)[..., None, None], 0.0), counts)
        if self.agents == "match":
            matching = cells.matched(key, valid)
            return group_means(query, matching.cell, cells.number, valid)
        return cells.means(query, valid)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
