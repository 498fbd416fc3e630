import json
import subprocess
import sys

CODE = """
import importlib, json, pkgutil, sys, time
import megalite
start = time.process_time()
import megalite.data_tools
package = time.process_time() - start
names = [m.name for m in pkgutil.walk_packages(megalite.data_tools.__path__, "megalite.data_tools.")]
for name in names:
    if not name.endswith("sample_corpus.make"):  # a script of its own, which needs pyarrow at once
        importlib.import_module(name)
print(json.dumps([names, package, time.process_time() - start, sorted(sys.modules)]))
"""


def test_data_tools_import_no_torch_and_are_quick():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    names, package_seconds, all_seconds, modules = json.loads(done.stdout)
    rooms = ("readers", "builder.building", "tokenizer_training")
    assert {f"megalite.data_tools.{room}" for room in rooms} <= set(names)
    heavy = {"torch", "deepspeed", "transformers", "wandb", "pyarrow", "sentencepiece", "tokenizers"}
    assert not heavy & set(modules)
    assert package_seconds < 1
    assert all_seconds < 1
