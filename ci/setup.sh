# Sourced by the scripts of ci/: puts in place what they need, and nothing that is there already.
# FASTRES_VENV names the virtual environment (.venv), FASTRES_PYTHON the Python it is made with (python3).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${FASTRES_VENV:-$root/.venv}
unset PYTHONPATH PYTHONHOME  # what runs is the installed package, never the source tree

say() { printf '%s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

# setup_python EXTRAS: the virtual environment has the sources of this moment installed, with these extras.
setup_python() {
    local extras=$1 state=$venv/fastres-installed hash
    setup_venv
    hash=$({ sources | (cd "$root" && xargs -0 sha256sum) && echo "${FASTRES_NO_EXTENSIONS:-}"; } | sha256sum)
    hash=${hash%% *}
    grep -qsxF "$hash $extras" "$state" && return

    [ "${FASTRES_NO_EXTENSIONS:-}" = 1 ] || setup_compiler
    say "Installing fastres[$extras] in $venv: about a minute"
    # What was installed with other extras counts only as long as the sources are the same.
    { grep -s "^$hash " "$state" || true; } >"$state.new"
    rm -f "$state"
    pip_install "$extras" || die "fastres[$extras] could not be installed: see above"
    echo "$hash $extras" >>"$state.new"
    mv "$state.new" "$state"
}

# From a copy of the sources: what earlier builds left in the tree (a module since deleted, say) must not get in.
pip_install() (
    build=$(mktemp -d) || exit
    trap 'rm -rf "$build"' EXIT
    sources | (cd "$root" && xargs -0 cp --parents -t "$build") || exit
    "$venv/bin/python" -m pip install -qq "${build}[$1]" </dev/null
)

# The files that the build reads, relative to the root.
sources() {
    (cd "$root" && find pyproject.toml setup.py MANIFEST.in README.md LICENSE fastres fastres_ext -type f \
        ! -name '*.c' ! -name '*.so' ! -name '*.pyc' -print0 | sort -z)
}

setup_venv() {
    local python=${FASTRES_PYTHON:-python3}
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 && return
    command -v "$python" >/dev/null || install_packages python3 python3-venv \
        || die "There is no $python. As root: apt-get install python3 python3-venv"
    # Debian's Python has no ensurepip until python3-venv is installed.
    "$python" -c 'import ensurepip' 2>/dev/null || install_packages python3-venv \
        || die "$python cannot make virtual environments. As root: apt-get install python3-venv"
    say "Making the virtual environment $venv"
    "$python" -m venv --clear "$venv" || die "The virtual environment $venv could not be made: see above"
}

# python_of VERSION: the path of such a Python on this machine, if there is one.
python_of() {
    local python
    for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        # A shim of pyenv may be of a version that is not switched on.
        ! "$python" -c "" 2>/dev/null || { command -v "$python"; return; }
    done
}

setup_compiler() {
    local header='import os, sysconfig; print(os.path.join(sysconfig.get_path("include"), "Python.h"))'
    command -v cc >/dev/null && [ -f "$("$venv/bin/python" -c "$header")" ] && return
    install_packages gcc libc6-dev python3-dev \
        || die "A C compiler and Python's headers are needed. As root: apt-get install gcc libc6-dev python3-dev" \
            "(or set FASTRES_NO_EXTENSIONS=1 for the slower package in pure Python)"
}

# Both fail when the program is neither there nor can be installed.
setup_rabbitmq() {
    [ -x /usr/lib/rabbitmq/bin/rabbitmq-server ] || command -v rabbitmq-server >/dev/null \
        || install_packages rabbitmq-server
}
setup_redis() { command -v redis-server >/dev/null || install_packages redis-server; }

# install_packages NAME...: with apt-get, as root only; never asks, and starts no service.
install_packages() (
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 1
    say "Installing $*"
    log=$(mktemp) policy=/usr/sbin/policy-rc.d
    trap 'rm -f "$log"' EXIT
    if ! [ -e $policy ]; then
        trap 'rm -f "$log" $policy' EXIT
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod +x $policy
    fi
    apt() { DEBIAN_FRONTEND=noninteractive apt-get -y --no-install-recommends "$@" </dev/null >"$log" 2>&1; }
    # A list of packages that is missing or too old shows as a failure.
    apt install "$@" || { apt update && apt install "$@"; } || { cat "$log" >&2; exit 1; }
)
