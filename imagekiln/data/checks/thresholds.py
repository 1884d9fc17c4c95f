"""What a check says (`Finding`) and what it is told (`CleanConfig`).

The defaults were chosen on 2,000 Oxford flowers, 3,000 pictures of CIFAR-10, 3,000 of Fashion-MNIST and 1,653 emoji,
together 9,653 real pictures; numbers in comments are of these unless they say otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from imagekiln.config import Fraction, Section

CheckName = Literal[
    "small",
    "narrow",
    "blank",
    "dark",
    "bright",
    "blurred",
    "duplicate",
    "near_duplicate",
    "outlier",
    "missing_label",
    "few_in_class",
    "two_labels",
    "suspicious_label",
    "missing_caption",
    "empty_caption",
    "repeated_caption",
    "long_caption",
    "odd_caption",
]


@dataclass(frozen=True)
class Finding:
    """One thing found in one file.

    check: its name, such as "blurred" or "duplicate". index: of the file in the survey. value: what was measured.
    threshold: the value it was compared with. other: index of the other file (duplicates), else -1.
    reason: words for `left_out.csv`, such as "blurred" or "same picture as a/1.jpg".
    """

    check: str
    index: int
    value: float
    threshold: float
    reason: str
    other: int = -1


class CleanConfig(Section):
    """Thresholds of the checks, and which of them leave pictures out."""

    # Only what no model can learn from, or would learn twice, is left out unasked. Near duplicates are kept and kept on
    # one side of the split; blurred, dark and odd pictures may be what the set is about.
    leave_out: tuple[CheckName, ...] = Field(
        ("small", "narrow", "blank", "duplicate"),
        description="checks whose pictures are left out; the others only mention",
    )
    # No absolute limit unasked: sets of 8 px icons are sets, too.
    min_side: int = Field(0, ge=0, le=4096, description="smallest short side in pixels")
    min_side_ratio: Fraction = Field(
        0.25, description="smallest short side over the set's median one; of no concern from 64 pixels on"
    )
    max_aspect: float = Field(3.0, ge=1, description="largest long side over short side")  # largest found: 2.33
    # Smallest contrast of a real picture: 0.036 (an airplane in fog); smallest entropy: 0.73 bits (a hollow square).
    min_contrast: Fraction = Field(0.025, description="smallest standard deviation of luma, white being 1")
    min_entropy: float = Field(0.5, ge=0, le=8, description="smallest entropy of the luma histogram, in bits")
    # Brightness + 2 contrast: smallest found 0.254. Brightness - 2 contrast: 0.75 is passed by 5 emoji of pale lines.
    dark: float = Field(0.25, ge=0, le=1, description="mean luma plus twice its deviation below which all is dark")
    bright: float = Field(0.75, ge=0, le=1, description="mean luma minus twice its deviation above which all is bright")
    # Smallest found: 0.33. Gaussian blurs of 3 to 6 % of the short side take 95 % of flowers (96 px) below 0.17 and
    # 95 % of CIFAR-10 below 0.22.
    min_sharpness: float = Field(
        0.3, ge=0, description="smallest energy of the finest details over that of larger ones"
    )
    # Copies (95 % crops, JPEG quality 30, brightness up to 30 %) of 2,000 pictures: 95 % of the crops are within 14
    # (flowers) and 18 bits (CIFAR-10), everything else within 6. Of unrelated pairs 1 in 1,300 to 2,600 is within 16.
    hash_bits: int = Field(16, ge=0, le=24, description="largest number of differing bits of 64 to look closer at")
    # The same copies after registration: residual at most 0.023 (99 %; CIFAR-10 at JPEG quality 30: 0.045), agreement
    # of details at least 0.95 (CIFAR-10 at JPEG quality 30: 0.92 in 95 %). Unrelated pairs: hardly any within either.
    max_residual: Fraction = Field(0.04, description="share of a picture that a near duplicate may leave unexplained")
    min_detail: Fraction = Field(0.9, description="smallest correlation of fine details of near duplicates")
    outlier_z: float = Field(6.0, gt=0, description="robust standard deviations from the set that make an outlier")
    min_in_class: int = Field(20, ge=0, description="pictures a class needs")
    label_probability: Fraction = Field(0.02, description="a label less probable than this is suspicious")
    max_caption_repeats: Fraction = Field(0.5, description="share of the captions that may be one and the same")
    max_caption_chars: int = Field(1000, ge=1, description="longest caption in characters")
