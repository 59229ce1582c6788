"""Everything here that depends on the version of SGLang, and nothing else.

Nobody outside imports ``sglang``, or uses what SGLang's names mark as private; ``tests/unit/test_imports.py``
holds both. The public face of SGLang's caches and linkers (methods that our classes override, fields of the
requests and nodes that they are handed) is used in ``radix_cache.py`` and ``linker.py``.

For another version of SGLang: run the tests of this room with it (``patches/README.md`` lists them), let what
differs stand beside what is here, and choose between the two where it is imported in this room.
"""
