import numpy as np
import pytest

from lexiseg.errors import DataError
from lexiseg.evaluation.boundary import BoundaryScore


def square(*, top=20, left=20, side=20, size=64) -> np.ndarray:
    labels = np.zeros((size, size), dtype=np.int64)
    labels[top : top + side, left : left + side] = 1
    return labels


def scored(*pairs, tolerance=0.0075, classes=("ground", "square")) -> BoundaryScore:
    score = BoundaryScore(classes, tolerance=tolerance)
    for truth, prediction in pairs:
        score.update(truth=truth, prediction=prediction)
    return score


def test_equal_maps_score_one():
    assert scored((square(), square())).f_score.tolist() == [1, 1]


def test_a_shift_within_the_tolerance_scores_one():
    # 0.0075 of the diagonal of 64 x 64 is 0.68: raised to one pixel
    assert scored((square(), square(left=21))).f_score.tolist() == [1, 1]


def test_a_shift_beyond_the_tolerance_by_hand():
    # The outline of the square has 76 pixels, columns 20..39. The prediction's is 3 to the right, the tolerance is 1.
    # Matched: in the top row columns 22..39 (18 pixels) and one pixel below its right end, the same at the bottom;
    # nothing else of the sides. The prediction's outline is the mirror image, so P = R = F.
    expected = 2 * (18 + 1) / 76
    assert scored((square(), square(left=23))).f_score[1] == pytest.approx(expected)


def test_tolerance_is_a_share_of_the_diagonal():
    diagonal = np.hypot(64, 64)
    pair = (square(), square(left=23))
    assert scored(pair, tolerance=3 / diagonal).f_score.tolist() == [1, 1]
    assert scored(pair, tolerance=2.9 / diagonal).f_score[1] < 1


def test_distance_is_euclidean():
    truth, prediction = np.zeros((2, 40, 40), dtype=np.int64)
    truth[10, 10], prediction[12, 12] = 1, 1  # 2.83 apart
    diagonal = np.hypot(40, 40)
    assert scored((truth, prediction), tolerance=2.8 / diagonal).f_score[1] == 0
    assert scored((truth, prediction), tolerance=2.9 / diagonal).f_score[1] == 1


def test_precision_and_recall_are_pooled_over_images():
    nothing = np.zeros((64, 64), dtype=np.int64)
    # 76 true outline pixels are found, 76 are missed: P = 1, R = 1/2
    assert scored((square(), square()), (square(), nothing)).f_score[1] == pytest.approx(2 / 3)


def test_a_class_without_boundary_is_absent():
    score = scored((square(), square()), classes=("ground", "square", "star"))
    assert np.isnan(score.f_score[2])
    assert score.mean(absent_class="exclude") == 1
    assert score.mean(absent_class="zero") == pytest.approx(2 / 3)
    nothing = np.zeros((8, 8), dtype=np.int64)
    assert scored((nothing, nothing)).mean(absent_class="exclude") is None


def test_a_class_only_in_the_prediction_scores_zero():
    nothing = np.zeros((64, 64), dtype=np.int64)
    assert scored((nothing, square())).f_score.tolist() == [0, 0]


def test_ignored_pixels_count_nowhere_and_make_no_boundary():
    truth = square()
    truth[:, 30:] = -100
    prediction = square()
    prediction[:, 32:] = 1  # wrong, but ignored
    assert scored((truth, prediction)).f_score.tolist() == [1, 1]
    half = np.zeros((64, 64), dtype=np.int64)
    half[:, 30:] = -100
    assert np.isnan(scored((half, np.zeros_like(half))).f_score).all()


def test_against_distances_of_all_pairs():
    rng = np.random.default_rng(5)
    truth = np.kron(rng.integers(0, 3, (6, 8)), np.ones((7, 5), dtype=np.int64))
    prediction = np.roll(truth, 2, axis=1)
    prediction[rng.random(prediction.shape) < 0.05] = 1
    truth[:3] = -100
    tolerance = 2.3 / np.hypot(*truth.shape)
    expected = []
    for label in range(3):
        true, predicted = outline(truth, truth, label), outline(prediction, truth, label)
        gaps = np.linalg.norm(true[:, None] - predicted[None], axis=2)
        recall, precision = (gaps.min(axis=1) <= 2.3).mean(), (gaps.min(axis=0) <= 2.3).mean()
        expected.append(2 * precision * recall / (precision + recall))
    score = scored((truth, prediction), tolerance=tolerance, classes=("a", "b", "c"))
    assert score.f_score.tolist() == pytest.approx(expected)


def outline(labels: np.ndarray, truth: np.ndarray, label: int) -> np.ndarray:
    labels = np.where(truth == -100, -100, labels)
    points = []
    for row, column in np.argwhere(labels == label):
        around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = [labels[r, c] for r, c in around if 0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]]
        if any(other not in (label, -100) for other in inside):
            points.append((row, column))
    return np.array(points)


def test_shapes_have_to_agree():
    with pytest.raises(DataError, match=r"shape \(8, 8\)") as caught:
        scored((square(), np.zeros((8, 8), dtype=np.int64)))
    assert caught.value.allowed == "equal shapes"
    assert "upsample" in caught.value.fix


def test_what_has_no_class_ends_its_neighbours_and_has_no_boundary_itself():
    prediction = np.where(square() == 1, 2, 0)  # the square is of no class
    score = scored((square(), prediction))
    assert score.f_score.tolist() == [1, 0]
    assert len(score.f_score) == 2
