"""The paper's law of loss against context."""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import least_squares


@dataclass(frozen=True)
class PowerLaw:
    """L(c) = (alpha / c) ** beta + gamma (arXiv:2309.16039, section 3.1), L in nats, c in tokens."""

    alpha: float
    beta: float
    gamma: float
    rmse: float

    def __call__(self, context: np.ndarray) -> np.ndarray:
        return (self.alpha / context) ** self.beta + self.gamma


def fit_power_law(context: np.ndarray, loss: np.ndarray) -> PowerLaw:
    """The law by least squares in log-loss, the fit that comes nearest to the paper's own parameters.

    Shapes (n,): `context` in tokens, `loss` in nats; `rmse` is the root mean square error of the loss itself, in nats.
    """

    def law(parameters: np.ndarray) -> np.ndarray:
        log_alpha, beta, gamma = parameters
        return np.exp(beta * (log_alpha - np.log(context))) + gamma

    fit = least_squares(
        lambda parameters: np.log(law(parameters)) - np.log(loss),
        x0=[np.log(20.0), 0.5, 0.9 * loss.min()],
        bounds=([-20.0, 0.01, 0.0], [20.0, 5.0, loss.max()]),
    )
    rmse = float(np.sqrt(np.mean((law(fit.x) - loss) ** 2)))
    return PowerLaw(float(np.exp(fit.x[0])), float(fit.x[1]), float(fit.x[2]), rmse)
