"""The loss behind a context of c tokens as (alpha / c)^beta + gamma, as Llama 2 Long reads from its Figure 1 (C5)."""

import numpy as np
from scipy.optimize import curve_fit

CLOSER = "power law minus line, distances"  # in records: below zero, the law is nearer to what was measured


def power_law(context: np.ndarray, log_alpha: float, beta: float, gamma: float) -> np.ndarray:
    """The loss at contexts in tokens, in nats. Its first number is log(alpha), which a fit finds more easily."""
    return np.exp(beta * (log_alpha - np.log(context))) + gamma


def fit_power_law(context: np.ndarray, losses: np.ndarray) -> dict[str, float]:
    """alpha, beta, gamma by least squares in log-loss, which comes nearest to the paper's own, and the rmse in nats."""
    begin, bounds = [np.log(20), 0.5, 0.9 * losses.min()], ([-20, 0.01, 0], [20, 5, losses.max()])
    found, _ = curve_fit(
        lambda *point: np.log(power_law(*point)), context, np.log(losses), begin, bounds=bounds, max_nfev=20_000
    )
    rmse = np.sqrt(np.mean((power_law(context, *found) - losses) ** 2))
    return {"alpha": float(np.exp(found[0])), "beta": float(found[1]), "gamma": float(found[2]), "rmse": float(rmse)}
