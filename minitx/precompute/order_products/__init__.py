"""Every dot product adds its products in an order that was found from the weights beforehand."""

from typing import Literal

from minitx.errors import MinitxError
from minitx.model import Linear
from minitx.precompute.order_products.accumulators import NarrowLinear
from minitx.shared.linears import change_linears, linears
from minitx.shared.ordering import ORDERS, OrderedLinear, in_order
from minitx.technique import technique


@technique(level="matrices", exact=True, neutral=None, after=("low_rank",))
def order_products(
    lm,
    *,
    order: Literal[
        "positives_first", "largest_first", "alternating", "largest_rows_first", "stored"
    ] = "positives_first",
    accumulator: int | None = None,
    matrices: Literal["all", "ffn", "attention"] = "all",
):
    """Reorder the weights within each dot product, by sign or by magnitude.

    Paper: listed by David Spuler's page "Weight Precomputations" (reordering weights to avoid
        overflows), without a method. For narrow accumulators: Vikas Natesh and H. T. Kung, 2025,
        "PQS (Prune, Quantize, and Sort)", arXiv 2504.09064, who sort the products of each token
        (their exact procedure is unconfirmed here). For stopping early: Akhlaghi et al., 2018,
        "SnaPEA" (ISCA), positive weights first. The orders of weights below were chosen here.
    Kind: exact but for the rounding of float sums in another order; on whole numbers bit for bit.
        With accumulator=BITS it is approximate: weights and inputs are rounded to 8 bits and added
        as a saturating accumulator of so many bits adds, in order to count its overflows.
    Skips or precomputes: nothing is skipped yet. It lays the weights out in the order in which a
        sum could be stopped, or a narrow accumulator should add.
    Offline: for each output o an order of the inputs, by its column w[:, o]:
        positives_first: w > 0, then the others, each by falling |w|. With inputs >= 0 (behind a
        ReLU) the sum falls from the first negative weight on: once below 0 it stays there.
        largest_first: by falling |w|, so that what is left to add is bounded best.
        alternating: a negative weight whenever the weights so far add up to more than 0, else a
        positive one; of each sign the largest first.
        largest_rows_first: one order for all outputs, by the falling length of w's rows; signs have
        none such. stored: as it was, to compare with.
    Online: y[o] = sum over k of x[order[k, o]] w[k, o], k = 0, 1, 2, ...
    Saves: no multiply-add. An order for each output takes in * out numbers of 1 byte (2 from 257
        inputs on), a quarter or a half of what float32 weights take, and they are read as well; a
        shared one takes in numbers. Narrow accumulators gain where inputs are >= 0 and alike: there
        alternating needs no more bits than the whole sum. In this project's models, measured on
        calibration stories, no order found beforehand saves a bit: the whole sums alone need as
        many. Where inputs have both signs so have the products, whatever the signs of the weights;
        and behind a ReLU most inputs are 0, which breaks an alternation.
        positives_first is by far the worst there: sums climb to the end of their range and back, so
        what stopping early wants is what narrow accumulators cannot bear. Sorting products token by
        token would avoid all overflows but those of whole sums ("sums that overflow on the way" are
        what it could save); and an accumulator that wraps around needs no order at all. In NumPy an
        order for each output is several times slower than the plain product, since every input is
        gathered for every output; a shared one costs little. An accumulator is simulated step by
        step, and that is slower by far.
    Neutral: nothing to set.
    Not for: a head, which is none of the matrices. Accumulators of less than 8 or more than 32
        bits.
    """
    if accumulator is not None and not 8 <= accumulator <= 32:
        raise MinitxError(
            f"order_products takes accumulators of 8 to 32 bits, not {accumulator}; give "
            "accumulator=16, or None to add in floating point."
        )

    def ordered(linear: Linear):
        found = ORDERS[order](linear.w)
        if accumulator is not None:
            return NarrowLinear.of(linear.w, linear.b, found, order, accumulator)
        return OrderedLinear(in_order(linear.w, found), found, order, linear.b)

    return change_linears(lm, linears(lm, matrices), ordered)
