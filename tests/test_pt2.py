"""Files that are not what laq.py or finetune.py exports are refused; torch alone runs what the
attacks hide in them."""

import contextlib
import io
import json
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

import common  # noqa: F401  (finds the scripts)
from vla import open_program


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("shift", torch.tensor([1.0]), persistent=False)  # saved as a constant

    def forward(self, x, y):
        return self.layer(x.float() / 127.5 - 1) * self.scale + self.shift + y


INPUTS = torch.arange(6, dtype=torch.uint8).reshape(2, 3), torch.ones(2, 4)


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """An archive as laq.py and finetune.py write theirs."""
    path = tmp_path_factory.mktemp("good") / "laq.pt2"
    batch = torch.export.Dim("B", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(Tiny().eval(), INPUTS, dynamic_shapes=({0: batch},) * 2)
    program.example_inputs = None
    torch.export.save(
        program, path, extra_files={"manifest.json": '{"schema": "laq.v2"}', "notes": "a  b"}
    )
    return path


def read(path) -> dict:
    """Archive -> {member: bytes}."""
    archive = PT2ArchiveReader(str(path))
    return {n: archive.read_bytes(n) for n in archive.get_file_names()}


def write(path, members: dict):
    """{member: bytes} -> archive; the writer adds .data/ and byteorder itself."""
    with PT2ArchiveWriter(str(path)) as archive:
        for name, content in members.items():
            if not name.startswith(".data/") and name != "byteorder":
                archive.write_bytes(name, content)


@contextlib.contextmanager
def edit(members: dict, member: str):
    content = json.loads(members[member])
    yield content
    members[member] = json.dumps(content).encode()


MODEL = "models/model.json"
CONFIGS = WEIGHTS, CONSTANTS = [f"data/{k}/model_{k}_config.json" for k in ("weights", "constants")]


def graph(content: dict) -> dict:
    return content["graph_module"]["graph"]


# ------------------------------------------------------------ attacks
# Each changes the members of a good archive so that the file `mark` appears when the code it hides
# runs.
class Payload:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def saved(mark) -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(mark), buffer)
    return buffer.getvalue()


def python(mark) -> str:
    """An expression that makes the file."""
    return f"__import__('pathlib').Path('{mark}').touch()"


def pickled_inputs(members, mark):
    members["data/sample_inputs/model.pt"] = saved(mark)


def legacy_weights(members, mark):
    members["data/weights/model.pt"] = saved(mark)


def legacy_constants(members, mark):
    members["data/constants/model.pt"] = saved(mark)


def pickled_weight(members, mark):
    with edit(members, WEIGHTS) as content:
        next(iter(content["config"].values()))["use_pickle"] = True
    members["data/weights/weight_0"] = saved(mark)


def pickled_weight_by_a_truthy_word(members, mark):
    with edit(members, WEIGHTS) as content:
        next(iter(content["config"].values()))["use_pickle"] = "False"
    members["data/weights/weight_0"] = saved(mark)


def pickled_constant(members, mark):
    with edit(members, CONSTANTS) as content:
        content["config"]["shift"]["use_pickle"] = True
    members["data/constants/tensor_0"] = saved(mark)


def opaque_constant(members, mark):
    """Unpickled although use_pickle is false; bytes pass as a tensor."""
    with edit(members, CONSTANTS) as content:
        content["config"]["shift"] |= {"path_name": "opaque_obj_0"}
        content["config"]["shift"]["tensor_meta"]["dtype"] = 1
    members["data/constants/opaque_obj_0"] = pickle.dumps(Payload(mark))


def expression(members, mark):
    """sympy.sympify evaluates it."""
    with edit(members, MODEL) as content:
        sizes = next(
            v["sizes"]
            for v in graph(content)["tensor_values"].values()
            if "as_expr" in v["sizes"][0]
        )
        sizes[0]["as_expr"]["expr_str"] = python(mark)


def guard(members, mark):
    """Becomes the source of a function where there are sample inputs, here harmless ones."""
    buffer = io.BytesIO()
    torch.save((INPUTS, {}), buffer)
    members["data/sample_inputs/model.pt"] = buffer.getvalue()
    with edit(members, MODEL) as content:
        content["guards_code"] = [python(mark) + " is None"]


def node_name(members, mark):
    """Becomes the source of forward()."""
    members[MODEL] = members[MODEL].replace(b'"y"', json.dumps(f"y={python(mark)}").encode())


def tree(members, mark):
    """Imports a module by name; here one that lies on the path."""
    (mark.parent / "planted.py").write_text(python(mark))
    with edit(members, MODEL) as content:
        signature = content["graph_module"]["module_call_graph"][0]["signature"]
        context = json.dumps({"__enum__": True, "fqn": "planted:A", "name": "a"})
        signature["in_spec"] = json.dumps(
            [1, {"type": "builtins.list", "context": context, "children_spec": []}]
        )


def mapped_file(members, mark):
    """An operator of aten that makes a file, put before the others."""
    inputs = {
        "filename": {"as_string": str(mark)},
        "shared": {"as_bool": True},
        "size": {"as_int": 4},
    }
    node = {
        "target": "torch.ops.aten.from_file.default",
        "outputs": [{"as_tensor": {"name": "added"}}],
        "metadata": {},
        "inputs": [{"name": n, "arg": a, "kind": 1} for n, a in inputs.items()],
    }
    with edit(members, MODEL) as content:
        graph(content)["tensor_values"]["added"] = next(
            iter(graph(content)["tensor_values"].values())
        )
        graph(content)["nodes"].insert(0, node)


def library(members, mark):
    """A compiled model: torch opens its shared object."""
    if not shutil.which("gcc"):
        pytest.skip("no compiler for the shared object")
    body = f'__attribute__((constructor)) void f() {{ fclose(fopen("{mark}", "w")); }}'
    source = f"#include <stdio.h>\n{body}"
    compiled = mark.with_suffix(".so")
    subprocess.run(
        ["gcc", "-x", "c", "-shared", "-fPIC", "-o", compiled, "-"],
        input=source.encode(),
        check=True,
    )
    members["data/aotinductor/model/model.wrapper.so"] = compiled.read_bytes()
    members["data/aotinductor/model/model.wrapper_metadata.json"] = b'{"AOTI_DEVICE_KEY": "cpu"}'


ATTACKS = (
    pickled_inputs,
    legacy_weights,
    legacy_constants,
    pickled_weight,
    pickled_weight_by_a_truthy_word,
    pickled_constant,
    opaque_constant,
    expression,
    guard,
    node_name,
    tree,
    mapped_file,
    library,
)


def refused(path) -> str:
    """The one line with which open_program ends."""
    with pytest.raises(SystemExit) as e:
        open_program(path)
    line = str(e.value)
    assert "\n" not in line and f"'{path}'" in line and "load only files you trust" in line
    return line


def test_own_export_opens(good):
    program, extra = open_program(good)
    assert extra == {"manifest.json": '{"schema": "laq.v2"}', "notes": "a  b"}
    assert torch.equal(program.module()(*INPUTS), torch.export.load(good).module()(*INPUTS))


def test_rewriting_changes_nothing(good, tmp_path):
    """So that what follows is refused for what it adds."""
    write(tmp_path / "laq.pt2", read(good))
    program, _ = open_program(tmp_path / "laq.pt2")
    assert torch.equal(program.module()(*INPUTS), torch.export.load(good).module()(*INPUTS))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda f: f.__name__)
def test_attack(attack, good, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    mark, path, members = tmp_path / "mark", tmp_path / "laq.pt2", read(good)
    attack(members, mark)
    write(path, members)
    line = refused(path)
    assert "holds" in line and not mark.exists(), line
    with contextlib.suppress(Exception):  # most fail once the payload has run
        torch.export.load(path).module()(*INPUTS)
    assert mark.exists(), "torch alone does not run this payload, so that the test shows nothing"


def test_layout_before_torch_2_7(good, tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "laq.pt2"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("version", "8.20")
        z.writestr("serialized_exported_program.json", read(good)[MODEL])
        for name in ("state_dict", "constants", "example_inputs"):
            z.writestr(f"serialized_{name}.pt", saved(mark))
    refused(path)
    assert not mark.exists()
    with contextlib.suppress(Exception):
        torch.export.load(path)
    assert mark.exists()


@pytest.mark.parametrize(
    "name",
    [
        "data/weights/../x",
        "models/other.json",
        "extra/a/b",
        "data/weights/weight_0.so",
        "data/constants/custom_obj_0",
        "data/aotinductor/model/model.so",
        "x",
    ],
)
def test_unknown_member(name, good, tmp_path):
    write(tmp_path / "laq.pt2", {**read(good), name: b"x"})
    assert f"member '{name}'" in refused(tmp_path / "laq.pt2")


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04" + bytes(99)])
def test_not_an_archive(content, tmp_path):
    (tmp_path / "laq.pt2").write_bytes(content)
    assert "cannot be read" in refused(tmp_path / "laq.pt2")


def test_missing_file(tmp_path):
    assert "cannot be read (FileNotFoundError" in refused(tmp_path / "laq.pt2")


def test_truncated_and_damaged(good, tmp_path):
    whole = good.read_bytes()
    weight = whole.index(read(good)["data/weights/weight_0"])
    flipped = whole[:weight] + bytes([whole[weight] ^ 1]) + whole[weight + 1 :]
    zeroed = whole[:weight] + bytes(8) + whole[weight + 8 :]
    for content in (whole[: len(whole) // 2], whole[:-30], flipped, zeroed, bytes(len(whole))):
        (tmp_path / "laq.pt2").write_bytes(content)
        assert "cannot be read" in refused(tmp_path / "laq.pt2")


def test_missing_member(good, tmp_path):
    for name in (MODEL, *CONFIGS, "data/sample_inputs/model.pt", "data/weights/weight_0"):
        write(tmp_path / "laq.pt2", {k: v for k, v in read(good).items() if k != name})
        refused(tmp_path / "laq.pt2")


# ------------------------------------------------------------ one text at a time
TARGETS = [
    "torch.os.system",
    "torch.hub.load",
    "torch.load",
    "torch.ops.aten.save.default",
    "torch.ops.aten.add",
    "torch.ops.aten.add.__class__",
    "torch.ops.aten.add.Tensor.x",
    "torch.ops.higher_order.cond",
    "math.sin",
    "_operator.attrgetter",
    "_operator.add",
    "#a:b",
]
EXPRESSIONS = [
    "oo",
    "2**9**9**9",
    "Symbol('s77')",
    "Symbol('s1', positive=True, integer=True)\n",
    "s77.__class__",
    "",
    "Mul(Integer(2), f(1))",
    "Symbol('s\u0661', positive=True, integer=True)",
]


def changed(good, tmp_path, change) -> str:
    """Why an archive is refused whose model.json went through `change`."""
    members = read(good)
    with edit(members, MODEL) as content:
        change(content)
    write(tmp_path / "laq.pt2", members)
    return refused(tmp_path / "laq.pt2")


@pytest.mark.parametrize("target", TARGETS)
def test_other_targets(target, good, tmp_path):
    line = changed(good, tmp_path, lambda c: graph(c)["nodes"][0].update(target=target))
    assert f"target '{target}'" in line


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_other_expressions(text, good, tmp_path):
    size = {"as_expr": {"expr_str": text, "hint": None}}
    assert f"expr_str {text!r}" in changed(
        good, tmp_path, lambda c: graph(c)["sym_int_values"].update(a=size)
    )


@pytest.mark.parametrize("name", ["metadata", "stack_trace", "torch_fn", "config"])
def test_no_name_hides_an_expression(name, good, tmp_path):
    """A tensor named like a comment does not make one of what is below it."""
    meta = {"sizes": [{"as_expr": {"expr_str": "print()", "hint": None}}]}
    assert "expr_str 'print()'" in changed(
        good, tmp_path, lambda c: graph(c)["tensor_values"].update({name: meta})
    )


def test_other_fields(good, tmp_path):
    def first(content):
        return graph(content)["nodes"][0]["inputs"][0]

    assert "guards_code 'print()'" in changed(
        good, tmp_path, lambda c: c.update(guards_code=["print()"])
    )
    assert "name 'a.b'" in changed(good, tmp_path, lambda c: first(c).update(name="a.b"))
    assert "as_string '/a'" in changed(
        good, tmp_path, lambda c: first(c).update(arg={"as_string": "/a"})
    )
    assert "as_operator 'math.sin'" in changed(
        good, tmp_path, lambda c: first(c).update(arg={"as_operator": "math.sin"})
    )
    assert "key 'a b'" in changed(
        good, tmp_path, lambda c: graph(c)["tensor_values"].update({"a b": {}})
    )
    assert "source_fn_stack 'a,torch.b'" in changed(
        good,
        tmp_path,
        lambda c: graph(c)["nodes"][0].update(metadata={"source_fn_stack": "a,torch.b"}),
    )


# ------------------------------------------------------------ the file itself
def test_what_is_checked_is_loaded(good, tmp_path, monkeypatch):
    """The file is read once: nothing is taken from what lies there a moment later."""
    later = read(good)
    legacy_weights(later, tmp_path / "mark")
    write(tmp_path / "laq.pt2", later)
    monkeypatch.setattr(Path, "read_bytes", lambda path, content=good.read_bytes(): content)
    program, _ = open_program(tmp_path / "laq.pt2")
    assert torch.equal(program.module()(*INPUTS), torch.export.load(good).module()(*INPUTS))
    assert not (tmp_path / "mark").exists()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_member_twice(good, tmp_path):
    """Whichever of two members of a name torch takes, it is the one that was checked."""
    mark, members = tmp_path / "mark", read(good)
    expression(members, mark)
    with zipfile.ZipFile(good) as a, zipfile.ZipFile(tmp_path / "laq.pt2", "w") as z:
        for name in a.namelist():
            z.writestr(name, a.read(name))
            if name.endswith(MODEL):
                z.writestr(name, members[MODEL])
    with contextlib.suppress(SystemExit):
        open_program(tmp_path / "laq.pt2")[0].module()(*INPUTS)
    assert not mark.exists()


@pytest.mark.parametrize("quantizer", ["nsvq", "vq", "fsq"])
@pytest.mark.parametrize("arch", ["vit", "cnn"])
def test_every_labeller_opens(arch, quantizer, tmp_path):
    """What new operators of a changed model would break."""
    import laq

    cfg = laq.Config(arch=arch, quantizer=quantizer)
    laq.check(cfg)
    model = laq.ExportedLabeller(laq.LAQ(cfg).eval())
    frames = torch.zeros(4, 2, cfg.image_size, cfg.image_size, 3, dtype=torch.uint8)
    with torch.no_grad():
        program = torch.export.export(
            model, (frames,), dynamic_shapes=({0: torch.export.Dim("B", min=1, max=64)},)
        )
    program.example_inputs = None
    torch.export.save(program, tmp_path / "laq.pt2")
    opened = open_program(tmp_path / "laq.pt2")[0].module()(frames)
    for name, a, b in zip(("codes", "vectors", "latents"), opened, model(frames), strict=True):
        assert torch.equal(a, b), name
