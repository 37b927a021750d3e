"""How the quiz loss, taken after the student's pilot steps, moves every teacher: one file a strategy, one signature.

With pilot loss l, pilot steps phi_j = update(phi_{j-1}, grad_phi l(phi_{j-1}; x_j)) and quiz loss q(phi_M), each leaves
dq/dtheta_k in the teachers' `.grad` (and dq/dw in that of learned teacher weights), the student as it found it, and the random
generators where the pilot's forwards left them. Source: MetaDistil (Zhou, Xu and McAuley, ACL 2022).

Another strategy is a file with a function of its name, and that name in `STRATEGIES`.
"""

from engine.meta.problem import Strategy
from engine.meta.strategies import double_backward, exact, finite_difference, first_order

STRATEGIES: dict[str, Strategy] = {
    "exact": exact.exact,
    "double_backward": double_backward.double_backward,
    "finite_difference": finite_difference.finite_difference,
    "first_order": first_order.first_order,
}
