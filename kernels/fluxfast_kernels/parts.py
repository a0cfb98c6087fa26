"""Text and image of a double block as one matrix of rows, so that one launch takes both."""

from typing import NamedTuple, TypeAlias

from torch import Tensor

# An operand of which each part has its own: the tensor of the only part, or the text's and the
# image's, which have one dtype. The gradient of such an operand has the same form.
PerPart: TypeAlias = Tensor | tuple[Tensor, Tensor]


class Parts(NamedTuple):
    """Whose the rows of a matrix x [R, D] are.

    The first `rows` rows are the text's of `batch` samples, sample after sample; the others are
    the image's, likewise. So `rows` and R - rows are multiples of `batch`.
    """

    rows: int
    batch: int

    def tokens(self, total: int) -> tuple[int, int]:
        """A sample's rows in the text and in the image, in a matrix of `total` rows."""
        samples = max(self.batch, 1)
        text, image = self.rows // samples, (total - self.rows) // samples
        assert text * samples == self.rows and image * samples == total - self.rows >= 0
        return text, image
