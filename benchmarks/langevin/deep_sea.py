"""Deep sea: a task that is only learned by trying again and again what does not pay (Osband et al. 2019, bsuite).

A boat starts in the upper left of a grid of 10 x 10 and sinks a row a step, to the left or the right; which of its two
actions is "right" differs from cell to cell. Every step right costs 0.001, and the lower right corner pays 1. Trying
at random finds it once in 1024 episodes. Deep Q-learning with replay; with Langevin noise the network itself is a
sample, and its greedy actions explore (Ishfaq et al. 2024, "Provable and practical: Efficient exploration in
reinforcement learning via Langevin Monte Carlo").

The weights have the prior exp(-0.1 |theta|^2 / 2) in units of half a squared difference, also without noise.

Shapes: E networks, B transitions, S states, H hidden units.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from imagekiln.core import mix
from imagekiln.optim import langevin, place

from .protocol import Arm, Metric, Places, Scores, Settings, Task
from .training import grid

SIDE, HIDDEN, BATCH, UPDATES, DISCOUNT = 10, 32, 64, 16, 0.99
COST, PRIOR, TARGET_EVERY = 0.01 / SIDE, 0.1, 4
NUM_STATES = SIDE * SIDE
SOLVED = 0.5
"""Share of the last tenth of the episodes in which the corner is reached."""


class Networks(nn.Module):
    """E networks of one hidden layer at once: from numbers of states (B,) to values (E, B, 2).

    prior: how much of a second, fixed network is added (Osband et al. 2018, "Randomized prior functions").
    """

    def __init__(self, num: int, prior: float, generator: torch.Generator) -> None:
        super().__init__()

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.inner = nn.Parameter(drawn(num, NUM_STATES, HIDDEN))
        self.outer = nn.Parameter(drawn(num, HIDDEN, 2) / HIDDEN**0.5 / 3)
        self.prior = prior
        self.register_buffer("fixed", drawn(num, NUM_STATES, 2))

    def forward(self, states_B: Tensor) -> Tensor:
        values = torch.relu(self.inner[:, states_B]) @ self.outer
        return values + self.prior * self.fixed[:, states_B]


class Sea:
    """One sea. `sail` plays an episode and says whether it found the corner."""

    def __init__(self, seed: int) -> None:
        flips = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(mix(seed, "sea"))) < 0.5
        self.flips: list[list[bool]] = flips.tolist()

    def sail(self, values_S2: list[list[float]], epsilon: float, luck: torch.Generator) -> tuple[list[tuple], bool]:
        """(state, action, reward, next state or -1) of every step of one episode, greedy but for epsilon."""
        column, steps = 0, []
        chance = torch.rand(SIDE, 2, generator=luck).tolist()
        for row in range(SIDE):
            state = row * SIDE + column
            action = int(values_S2[state][1] > values_S2[state][0])
            if chance[row][0] < epsilon:
                action = int(chance[row][1] < 0.5)
            right = bool(action) != self.flips[row][column]
            reached = right and row == SIDE - 1 and column == SIDE - 1
            column = min(SIDE - 1, column + 1) if right else max(0, column - 1)
            after = -1 if row == SIDE - 1 else (row + 1) * SIDE + column
            steps.append((state, action, float(reached) - COST * right, after))
        return steps, reached


def _train(settings: Settings, seed: int, places: Places) -> Scores:
    luck = torch.Generator().manual_seed(mix(seed, "luck"))
    num = settings.get("networks", 1)
    networks = Networks(num, settings.get("prior", 0.0), luck)
    target = Networks(num, settings.get("prior", 0.0), luck)
    target.load_state_dict(networks.state_dict())
    optimizer: torch.optim.Optimizer = torch.optim.Adam(
        networks.named_parameters(), lr=5e-3, betas=(0.9, 0.99), eps=1e-5, fused=True
    )
    if settings.get("temperature"):
        optimizer = langevin(optimizer, diffusion=settings["temperature"], seed=mix(seed, "noise"), law="matched")
    sea, memory, masks, found = Sea(seed), list[tuple](), list[Tensor](), list[bool]()
    every_state, num_episodes = torch.arange(NUM_STATES), places.num(600, 6)
    for episode in range(num_episodes):
        acting = int(torch.randint(num, (), generator=luck))
        with torch.no_grad():
            values = networks(every_state)[acting].tolist()
        steps, reached = sea.sail(values, settings.get("epsilon", 0.0), luck)
        memory += steps
        found.append(reached)
        # Each network learns from its own half of the episodes, one alone from all.
        masks += [(torch.rand(num, generator=luck) < 0.5).float() if num > 1 else torch.ones(1)] * SIDE
        if episode % TARGET_EVERY == 0:
            target.load_state_dict(networks.state_dict())
        states, actions, rewards, after = (torch.tensor(column) for column in zip(*memory, strict=True))
        kept = torch.stack(masks, dim=1)
        for update in range(UPDATES):
            # D = T / N, and N grows
            place(optimizer, step=episode * UPDATES + update, factor=1 / len(memory))
            rows = torch.randint(len(memory), (BATCH,), generator=luck)
            loss = _loss(networks, target, (states[rows], actions[rows], rewards[rows], after[rows]), kept[:, rows])
            loss = loss + PRIOR / 2 / len(memory) * sum(p.square().sum() for p in networks.parameters())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if settings.get("article"):
                with torch.no_grad():
                    for p in networks.parameters():
                        p.add_(torch.randn(p.shape, generator=luck), alpha=(2 * settings["article"]) ** 0.5)
    last = found[-max(1, num_episodes // 10) :]
    missed = 100 * (1 - sum(found) / len(found))
    return {"last": {"validation": missed, "missed": missed, "solved": float(sum(last) >= SOLVED * len(last))}}


def _loss(networks: Networks, target: Networks, batch: tuple[Tensor, ...], kept_EB: Tensor) -> Tensor:
    """Half the squared temporal difference, summed over networks."""
    states, actions, rewards, after = batch
    with torch.no_grad():
        following = target(after.clamp_min(0)).max(2).values * (after >= 0)
        wanted = rewards + DISCOUNT * following
    values = networks(states).gather(2, actions.expand(len(kept_EB), -1)[:, :, None]).squeeze(2)
    return ((values - wanted).square() * kept_EB).mean(1).sum() / 2


DEEP_SEA = Task(
    "h",
    "Deep sea of 10 x 10, Q-learning, 600 episodes",
    {"solved": Metric(lower=False, worst=0.0, yes_no=True), "missed": Metric(lower=True, worst=100.0)},
    (
        Arm("greedy", ({},)),
        Arm("Langevin Adam", grid("temperature", (0.01, 0.03, 0.1)), ours=True),
        Arm("epsilon-greedy", grid("epsilon", (0.05, 0.2, 0.5))),
        Arm("ensemble with priors", grid("prior", (0.1, 0.3, 1.0), networks=5)),
        Arm("article's loop", grid("article", (1e-8, 1e-7, 1e-6))),
    ),
    "greedy",
    _train,
    num_seeds=10,
    expected="a clear win over greedy and epsilon-greedy",
)

TASKS = (DEEP_SEA,)
