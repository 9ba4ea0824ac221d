# Sourced by ci/fuzz, ci/sanitize and ci/coverage: the compiled modules built another way, in a folder of their own.

. ci/setup.sh

export CI=true  # Hypothesis repeats its examples then, and has no deadline for each: these builds are slow
export PYTHONDONTWRITEBYTECODE=1

# What runs on them, but for the two tests that take half of the time: ci/fuzz does what they do.
tests=("$root"/tests/{unit,parity,fuzz})
for test in test_json_text test_json_that_was_damaged; do
    tests+=(--deselect "tests/parity/test_decode_parity.py::$test")
done

# instrumented NAME OPTION...: fastres in build/NAME, built with $CC, $CFLAGS and cythonize's OPTIONs; it is what the
# Pythons started from here on import. The virtual environment is ready, and has what is installed there left alone.
instrumented() {
    folder=$root/build/$1
    shift
    rm -rf "$folder"
    mkdir -p "$folder"
    # Without pyproject.toml: setuptools would read it.
    sources | grep -zE '^fastres(_ext)?/' | (cd "$root" && xargs -0 cp --parents -t "$folder")
    (cd "$folder" && "$venv/bin/cythonize" -3 -i "$@" fastres_ext/*.pyx >build.log 2>&1) \
        || { cat "$folder/build.log" >&2; die "The compiled modules could not be built: see above"; }
    export PYTHONPATH=$folder
}
