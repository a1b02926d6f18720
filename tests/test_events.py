import cv2
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from events import WIDTH, EventWriter


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    return events


def test_tensorboard_reads_scalars_pictures_and_histograms_back(tmp_path):
    values = np.random.default_rng(0).normal(10, 3, 500)
    picture = np.full((WIDTH // 2, 2 * WIDTH, 3), (200, 30, 30), np.uint8)
    with EventWriter(tmp_path) as writer:
        for step in range(3):
            writer.add_scalar("number", step / 2, step)
        writer.add_image("picture", picture)
        writer.add_histogram("sizes", values)
    events = read_events(tmp_path)
    assert [(event.step, event.value) for event in events.Scalars("number")] == [(0, 0.0), (1, 0.5), (2, 1.0)]
    shown = events.Images("picture")[0]
    assert (shown.width, shown.height) == (WIDTH, WIDTH // 4)
    decoded = cv2.imdecode(np.frombuffer(shown.encoded_image_string, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert decoded.shape == (WIDTH // 4, WIDTH, 3) and np.abs(decoded.mean((0, 1)) - (200, 30, 30)).max() < 3
    histogram = events.Histograms("sizes")[0].histogram_value
    assert histogram.num == 500 and histogram.sum == np.float64(values.sum())
    assert (histogram.min, histogram.max) == (values.min(), values.max()) and sum(histogram.bucket) == 500


def test_a_histogram_of_one_value_can_be_written(tmp_path):
    with EventWriter(tmp_path) as writer:
        writer.add_histogram("sizes", np.array([5.0]))
    assert sum(read_events(tmp_path).Histograms("sizes")[0].histogram_value.bucket) == 1
