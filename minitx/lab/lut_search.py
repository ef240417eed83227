"""The search of ``lut-product search=true``, with everything that it tries:

    python -m minitx.lab.lut_search [MODEL] [drop=0.01] [cache=65536] [stories=16] ...

Options are those of the technique. It prints what was found as a flag to use.
"""

import sys

import minitx
from minitx.errors import MinitxError
from minitx.precompute.lut_product.bit_search import Search, find_bits
from minitx.shared.table_lookup import constant_matrices
from minitx.technique import find


def search(lm, **options) -> Search:
    """The search on a dense LM with these options of ``lut_product``, defaults for the others."""
    technique = find("lut_product")
    o = {name: option.default for name, option in technique.options.items()}
    o |= technique.checked(options)
    nodes = constant_matrices("lut_product", lm, o["layers"], o["head"])
    return find_bits(lm, nodes, o["drop"], o["cache"], o["stories"])


def main(words: list[str]) -> int:
    """Print the search. Returns 0, or 2 for bad input, which is one sentence on stderr."""
    try:
        names = [word for word in words if "=" not in word]
        if len(names) > 1:
            raise MinitxError(f"{names[1]!r} is one word too many; give one model.")
        options = find("lut_product").read(word for word in words if "=" in word)
        found = search(minitx.load(*names or ["stories"]), **options)
    except MinitxError as error:
        print(f"minitx: {error}", file=sys.stderr)
        return 2
    print(found)
    print(f"--lut-product {found.options}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
