"""GeoJSON out and in: what QuPath needs, what editors write, and files that are none."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
import shapely
import shapely.affinity
import shapely.geometry

from geojson import GeoJsonError, GeoJsonWriter, check_inside, read_geojson
from image_headers import ImageError
from image_io import write_image
from polygons import Shape, rasterise, rasterise_classes, trace_labels

SQUARE = [[0, 0], [4, 0], [4, 4], [0, 4], [0, 0]]
HOLE = [[1, 1], [1, 3], [3, 3], [3, 1], [1, 1]]
FAR_SQUARE = [[10, 10], [12, 10], [12, 12], [10, 12], [10, 10]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE, HOLE]}


def feature(geometry, **properties) -> dict:
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def collection(*features) -> dict:
    return {"type": "FeatureCollection", "features": list(features)}


def save(folder: Path, document, encoding: str = "utf-8") -> Path:
    path = folder / "drawn.geojson"
    path.write_text(json.dumps(document, ensure_ascii=False), encoding=encoding)
    return path


def label_map() -> np.ndarray:
    """Rings, a region in the hole of another, regions that touch."""
    labels = np.zeros((12, 15), np.uint32)
    labels[1:9, 1:9] = 1
    labels[2:8, 2:8] = 0
    labels[4:6, 4:6] = 2
    labels[9:12, 3:15] = 3
    labels[0, 14] = 9
    return labels


def write(path: Path, labels: np.ndarray, **options) -> dict:
    with GeoJsonWriter(path, **options) as writer:
        for polygon in trace_labels(labels):
            writer.write(polygon, "сосуд", measurements={"Area px": polygon.area})
    assert writer.count == len(np.unique(labels[labels > 0]))
    return json.loads(path.read_text(encoding="utf-8"))


# ---- writing


def test_features_are_what_qupath_reads(tmp_path):
    document = write(tmp_path / "a.geojson", label_map(), colours={"сосуд": (200, 10, 0)}, object_type="detection")
    assert set(document) == {"type", "features"} and document["type"] == "FeatureCollection"
    assert len(document["features"]) == 4
    ids = [uuid.UUID(item["id"]) for item in document["features"]]
    assert len(set(ids)) == 4
    by_name = {}
    for item in document["features"]:
        assert set(item) == {"type", "id", "geometry", "properties"} and item["type"] == "Feature"
        properties = item["properties"]
        assert set(properties) == {"objectType", "name", "classification", "measurements"}
        assert properties["objectType"] == "detection"
        assert properties["classification"] == {"name": "сосуд", "color": [200, 10, 0]}
        outline = shapely.geometry.shape(item["geometry"])
        assert outline.is_valid and outline.area == properties["measurements"]["Area px"]
        assert outline.exterior.is_ccw and not any(hole.is_ccw for hole in outline.interiors)
        by_name[properties["name"]] = outline.area
    areas = np.bincount(label_map().ravel())
    assert by_name == {f"сосуд {label}": areas[label] for label in (1, 2, 3, 9)}
    assert write(tmp_path / "again" / "a.geojson", label_map())["features"][0]["id"] == document["features"][0]["id"]


def test_coordinates_are_whole_where_they_can_be(tmp_path):
    text = {}
    for scale in (1.0, 4.0, 2.5, 1 / 3):
        write(tmp_path / "a.json", label_map(), scale=scale)
        lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
        text[scale] = next(line for line in lines if '"сосуд 9"' in line).split('"coordinates":')[1].split('},"')[0]
    assert text[1.0] == "[[[14,0],[15,0],[15,1],[14,1],[14,0]]]"
    assert text[4.0] == "[[[56,0],[60,0],[60,4],[56,4],[56,0]]]"
    assert text[2.5] == "[[[35,0],[37.5,0],[37.5,2.5],[35,2.5],[35,0]]]"
    assert text[1 / 3] == "[[[4.667,0],[5,0],[5,0.333],[4.667,0.333],[4.667,0]]]"


@pytest.mark.parametrize(
    "affine",
    [
        (0.5, 0.0, 500_000.0, 0.0, -0.5, 6_000_000.0),
        (0.4, 0.3, 500_000.0, 0.3, -0.4, 6_000_000.0),
        (0.4, -0.3, -7.0, 0.3, 0.4, 11.0),
        (1e-5, 0.0, 30.123456, 0.0, -2e-5, 59.9),
        (0.0, 2.0, 0.0, 2.0, 0.0, 0.0),
    ],
)
def test_map_coordinates(tmp_path, affine):
    scale = 3.0
    document = write(tmp_path / "a.geojson", label_map(), scale=scale, affine=affine, epsg=32636)
    assert document["crs"] == {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32636"}}
    a, b, c, d, e, f = affine
    pixel = abs(a * e - b * d)
    pixels = {
        f"сосуд {polygon.label}": shapely.Polygon(polygon.exterior, polygon.holes)
        for polygon in trace_labels(label_map())
    }
    for item in document["features"]:
        outline = shapely.geometry.shape(item["geometry"])
        expected = shapely.affinity.affine_transform(
            pixels[item["properties"]["name"]], [a * scale, b * scale, d * scale, e * scale, c, f]
        )
        assert outline.is_valid
        assert outline.exterior.is_ccw and not any(hole.is_ccw for hole in outline.interiors)
        assert shapely.hausdorff_distance(outline, expected) < 2e-3 * pixel**0.5
        assert outline.area == pytest.approx(expected.area, rel=2e-3)
        assert item["properties"]["classification"] == {"name": "сосуд"}


def test_no_objects_give_an_empty_collection(tmp_path):
    assert write(tmp_path / "a.geojson", np.zeros((3, 3), np.uint32)) == collection()
    assert read_geojson(tmp_path / "a.geojson") == ([], [])


def test_measurements_are_numbers_of_json(tmp_path):
    (polygon,) = trace_labels(np.ones((2, 2), np.uint32))
    with GeoJsonWriter(tmp_path / "a.geojson") as writer:
        values = {"n": np.uint32(7), "x": np.float32(0.5), "bad": float("nan"), "far": np.inf, "z": 3}
        writer.write(polygon, 'a "b"', name="x\ny", measurements=values)
    properties = json.loads((tmp_path / "a.geojson").read_text())["features"][0]["properties"]
    assert properties["measurements"] == {"n": 7, "x": 0.5, "z": 3}
    assert (properties["classification"]["name"], properties["name"]) == ('a "b"', "x\ny")


def test_a_failed_run_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.geojson"
    write(path, label_map())
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), GeoJsonWriter(path) as writer:
        writer.write(trace_labels(label_map())[0], "a")
        raise RuntimeError("stop")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.geojson"]


@pytest.mark.parametrize("affine", [(1.0, 2.0, 0.0, 2.0, 4.0, 0.0), (np.nan, 0, 0, 0, 1, 0), (1, 0, np.inf, 0, 1, 0)])
def test_a_map_without_area_is_refused(tmp_path, affine):
    with pytest.raises(ValueError, match=r"map pixels to no area; expected .*: read both from the slide"):
        GeoJsonWriter(tmp_path / "a.geojson", affine=affine)
    with pytest.raises(ValueError, match="scale 0 and affine None"):
        GeoJsonWriter(tmp_path / "a.geojson", scale=0)


@pytest.mark.parametrize("scale", [1.0, 8.0, 1.7])
def test_masks_come_back_from_files(tmp_path, scale):
    """Objects by the thousand, through more text than is gathered at a time."""
    rng = np.random.default_rng(1)
    labels = np.zeros((140, 150), np.uint32)
    labels[::2, ::2] = rng.permutation(np.arange(1, labels[::2, ::2].size + 1)).reshape(70, 75)
    write(tmp_path / "a.geojson", labels, scale=scale)
    assert (tmp_path / "a.geojson").stat().st_size > 1 << 20
    shapes, findings = read_geojson(tmp_path / "a.geojson")
    assert findings == [] and {shape.name for shape in shapes} == {"сосуд"}
    assert np.array_equal(rasterise(shapes, 0, 0, 140, 150, scale), labels > 0)
    assert check_inside(shapes, int(140 * scale), int(150 * scale)) == []


# ---- reading


@pytest.mark.parametrize(
    "document",
    [
        collection(feature(POLYGON)),
        [feature(POLYGON)],
        feature(POLYGON),
        POLYGON,
        {"geometry": POLYGON},
        {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE]]},
        {"type": "GeometryCollection", "geometries": [{"type": "GeometryCollection", "geometries": [POLYGON]}]},
        {"type": "Polygon", "coordinates": [SQUARE[:-1], HOLE[:-1]]},
        {"type": "Polygon", "coordinates": [[[x, y, 7.5] for x, y in SQUARE], [[*HOLE[0], 1], *HOLE[1:]]]},
    ],
)
def test_containers(tmp_path, document):
    shapes, findings = read_geojson(save(tmp_path, document))
    assert findings == []
    (shape,) = shapes
    assert (shape.name, shape.feature) == (None, 1)
    assert [ring.tolist() for ring in shape.rings] == [SQUARE, HOLE]
    assert all(ring.dtype == np.float64 for ring in shape.rings)


def test_the_parts_of_a_multipolygon_share_a_number(tmp_path):
    parts = {"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [FAR_SQUARE]]}
    shapes, findings = read_geojson(save(tmp_path, collection(feature(None), feature(parts, label="b"))))
    assert [(shape.name, shape.feature, len(shape.rings)) for shape in shapes] == [("b", 2, 2), ("b", 2, 1)]
    assert rasterise_classes(shapes, {"b": 5}, (0, 0, 12, 12)).sum() == 5 * (16 - 4 + 4)
    assert [str(finding) for finding in findings] == [
        "feature 1: has the geometry null, expected a Polygon or a MultiPolygon"
    ]


@pytest.mark.parametrize(
    ("properties", "name"),
    [
        ({"classification": {"name": "Tumor", "color": [1, 2, 3]}, "name": "left one"}, "Tumor"),
        ({"classification": {"name": "Tumor", "colorRGB": -377282}}, "Tumor"),
        ({"classification": {"names": ["Tumor", "Positive"]}}, "Tumor: Positive"),
        ({"classification": "Stroma"}, "Stroma"),
        ({"classification": None, "class": "a", "label": "b"}, "a"),
        ({"label": 3, "name": "c"}, "3"),
        ({"class": "  ", "name": " c "}, "c"),
        ({"class": True, "area": 5}, None),
        ({"classification": {}}, None),
        (None, None),
        ("text", None),
    ],
)
def test_class_names(tmp_path, properties, name):
    document = {"type": "Feature", "geometry": POLYGON, "properties": properties}
    assert read_geojson(save(tmp_path, document))[0][0].name == name


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp1251", "utf-16"])
def test_encodings(tmp_path, encoding):
    path = save(tmp_path, collection(feature(POLYGON, label="Сосуд №1")), encoding)
    assert read_geojson(path)[0][0].name == "Сосуд №1"


@pytest.mark.parametrize(
    ("geometry", "kind", "message"),
    [
        (None, "no geometry", "has the geometry null, expected a Polygon or a MultiPolygon"),
        ([SQUARE], "no geometry", "has the geometry [[[0, 0], [4, 0]"),
        ({}, "no area", "is a null, which covers no pixels"),
        (
            {"type": "Point", "coordinates": [1, 2]},
            "no area",
            'is a "Point", which covers no pixels; expected a Polygon',
        ),
        ({"type": "LineString", "coordinates": SQUARE}, "no area", 'is a "LineString", which covers no pixels'),
        ({"type": ["Polygon"], "coordinates": SQUARE}, "no area", 'is a ["Polygon"], which'),
        ({"type": "Polygon"}, "no geometry", "is a Polygon of null, expected a list of its parts"),
        ({"type": "Polygon", "coordinates": []}, "no geometry", "is a Polygon of [], expected"),
        ({"type": "MultiPolygon", "coordinates": [None]}, "bad ring", "has a polygon null, expected its rings"),
        ({"type": "GeometryCollection", "geometries": {}}, "no geometry", "is a GeometryCollection of {}"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [4, 4]]]}, "bad ring", "ring 1 has 2 points; expected at least"),
        ({"type": "Polygon", "coordinates": [[[0, 0], [4, 4], [0, 0]]]}, "bad ring", "ring 1 has 2 points"),
        ({"type": "Polygon", "coordinates": [SQUARE, []]}, "bad ring", "ring 2 has 0 points"),
        ({"type": "Polygon", "coordinates": SQUARE}, "bad ring", "ring 1 is no list of points"),
        ({"type": "Polygon", "coordinates": ["abc"]}, "bad ring", "ring 1 is no list of points"),
        (
            {"type": "Polygon", "coordinates": [[["0", "0"], ["4", "0"], ["4", "4"]]]},
            "bad ring",
            "is no list of points",
        ),
        ({"type": "Polygon", "coordinates": [[[0, None], [4, 0], [4, 4]]]}, "bad ring", "is no list of points"),
        ({"type": "Polygon", "coordinates": [[[0], [4], [4], [5]]]}, "bad ring", "is no list of points"),
        (
            {"type": "Polygon", "coordinates": [[[0, float("nan")], [4, 0], [4, 4]]]},
            "bad ring",
            "ring 1 has coordinates that are not finite; expected at least three points [x, y]: draw it again",
        ),
        ({"type": "Polygon", "coordinates": [[[0, 10**400], [4, 0], [4, 4]]]}, "bad ring", "are not finite"),
    ],
)
def test_what_is_no_shape_is_reported_and_the_rest_read(tmp_path, geometry, kind, message):
    document = collection(feature(POLYGON, label="a"), feature(geometry), feature(POLYGON, label="c"))
    shapes, (finding,) = read_geojson(save(tmp_path, document))
    assert [(shape.name, shape.feature) for shape in shapes] == [("a", 1), ("c", 3)]
    assert (finding.feature, finding.kind) == (2, kind)
    assert message in finding.problem
    assert str(finding).startswith("feature 2: ")


def test_good_parts_of_a_collection_are_kept(tmp_path):
    mixed = {"type": "GeometryCollection", "geometries": [{"type": "Point", "coordinates": [0, 0]}, POLYGON]}
    shapes, findings = read_geojson(save(tmp_path, [feature(mixed), 5, "x"]))
    assert [shape.feature for shape in shapes] == [1]
    assert [(finding.feature, finding.kind) for finding in findings] == [
        (1, "no area"),
        (2, "no geometry"),
        (3, "no geometry"),
    ]
    assert str(findings[1]) == "feature 2: is 5, expected a Feature"


def test_collections_inside_each_other_end(tmp_path):
    geometry = POLYGON
    for _ in range(100):
        geometry = {"type": "GeometryCollection", "geometries": [geometry]}
    shapes, (finding,) = read_geojson(save(tmp_path, geometry))
    assert shapes == [] and "more than 32 collections inside each other" in finding.problem


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"drawn.geojson is empty \(0 bytes\); expected GeoJSON: export it again"),
        (b" \n", r"is empty"),
        (b"\xef\xbb\xbf\n", r"is empty"),
        (b"\xef\xbb\xbf \n \n\xc2\xa0", r"is not JSON"),
        (
            json.dumps(collection(feature(POLYGON))).encode()[:90],
            r"ends too early \(line 1, column 85: .*copy or export",
        ),
        (b'{"type": "FeatureCollection", "features": [}', r"is not JSON at '\}' \(line 1, column 44"),
        (b"id,predicted\n1,2 3", r"is not JSON at 'id,predicted 1,2 3'|is not JSON at 'id,predicted"),
        (b"\x98\x00\xff\xff", r"is not text in utf-8-sig or cp1251; expected GeoJSON: save it as UTF-8"),
        (b"\xff\xfe\x00\xd8", r"is not text in utf-16"),
        (b"[" * 200_000, r"is no GeoJSON \(.*recursion.*expected features"),
        (b"[" + b"9" * 5000 + b"]", r"is no GeoJSON \(.*digits"),
        (b"12345", r"holds 12345; expected GeoJSON: a FeatureCollection"),
        (b"null", r"holds null; expected"),
        (b'{"type": "Topology", "objects": {}}', r'holds an object with \["type", "objects"\]; expected GeoJSON'),
        (b'{"type": ["Feature"]}', r"holds an object with"),
        (b'{"type": "FeatureCollection"}', r"is a FeatureCollection whose features are null; expected a list"),
    ],
)
def test_files_that_are_none(tmp_path, data, message):
    path = tmp_path / "drawn.geojson"
    path.write_bytes(data)
    with pytest.raises(GeoJsonError, match=message) as caught:
        read_geojson(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ImageError)


def test_a_picture_is_no_geojson(tmp_path):
    write_image(tmp_path / "a.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(GeoJsonError, match="a.png is not"):
        read_geojson(tmp_path / "a.png")
    with pytest.raises(FileNotFoundError):
        read_geojson(tmp_path / "none.geojson")


# ---- against the image


@pytest.mark.parametrize(
    ("ring", "word"),
    [
        (SQUARE, ""),
        ([[-1, -1], [10, -1], [10, 9], [-1, -1]], ""),
        ([[-1.5, 0], [4, 0], [4, 4], [-1.5, 0]], "partly"),
        ([[0, 0], [4, 0], [4, 9.5], [0, 0]], "partly"),
        ([[0, 0], [11, 0], [4, 4], [0, 0]], "partly"),
        ([[50, 60], [70, 60], [70, 80], [50, 60]], "wholly"),
        ([[0, -9], [4, -9], [4, -2], [0, -9]], "wholly"),
    ],
)
def test_shapes_outside_the_image(ring, word):
    shape = Shape("a", (np.array(ring, np.float64),), 7)
    findings = check_inside([shape], 8, 9)
    if not word:
        assert findings == []
        return
    (finding,) = findings
    assert (finding.feature, finding.kind) == (7, "outside")
    assert f"lies {word} outside the image: x {ring[0][0]:g} to" in str(finding)
    assert "expected x 0 to 9, y 0 to 8: is it of another image" in str(finding)
    assert check_inside([shape], 8, 9, tolerance=1000) == []
