#!/bin/sh
# Makes .venv ready to run offrl_jax; the Makefile calls it before every command.
#
#   tools/install.sh          install what is missing (nothing, in a second call)
#   tools/install.sh --detect print the jax build for this machine: cpu cuda12 cuda13 tpu
#   tools/install.sh --wheels download into WHEELS all that an install elsewhere needs
#
# Environment (all optional):
#   PYTHON  interpreter to build .venv with (python3)
#   ACCEL   jax build, instead of asking the machine
#   WHEELS  folder of wheels: install from it alone, without any network
#   SYSTEM  1: use the packages of PYTHON's own installation, its jax above all
#   EXTRAS  extras of pyproject.toml, separated by blanks (test)
set -eu
cd "$(dirname "$0")/.."

VENV=.venv
stamp=$VENV/.installed   # words that describe a finished install
busy=$VENV/.installing   # process id of one under way
PYTHON=${PYTHON:-}       # empty: any will do
SYSTEM=${SYSTEM:-}       # empty: as it was installed
ACCEL=${ACCEL:-}
WHEELS=${WHEELS:-}
EXTRAS=${EXTRAS:-test}

die() { echo "install: $*" >&2; exit 1; }
note() { echo "install: $*" >&2; }

# The lowest drivers are those of jax's installation page (CUDA 12: 525, CUDA 13: 580);
# CUDA 13 also dropped every GPU below compute capability 7.5.
nvidia_build() {
    drivers=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null) ||
        return 1
    driver=$(echo "$drivers" | head -n 1)
    major=${driver%%.*}
    case $major in '' | *[!0-9]*) return 1 ;; esac
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null |
        sort -n -t . -k 1,1 -k 2,2 | head -n 1)
    # A driver too old to know this query is too old for CUDA 13 as well.
    case $capability in [1-6].* | 7.[0-4]) old_gpu=1 ;; *) old_gpu=0 ;; esac
    if [ "$major" -ge 580 ] && [ "$old_gpu" = 0 ]; then
        echo cuda13
    elif [ "$major" -ge 525 ]; then
        echo cuda12
    else
        note "NVIDIA driver $driver is older than 525, which jax's CUDA builds need;" \
            "using the CPU (update the driver, or set ACCEL)"
        return 1
    fi
}

# jax itself looks for TPUs in the same way: Google's PCI vendor id and a known chip.
has_tpu() {
    for vendor in "${PCI_DEVICES:-/sys/bus/pci/devices}"/*/vendor; do
        [ -r "$vendor" ] && [ "$(cat "$vendor")" = 0x1ae0 ] || continue
        case $(cat "${vendor%vendor}device") in
            0x0027 | 0x0056 | 0x005e | 0x0062 | 0x0063 | 0x006f | 0x0076) return 0 ;;
        esac
    done
    return 1
}

detect() {
    if [ -n "$ACCEL" ]; then
        case $ACCEL in
            cpu | cuda12 | cuda13 | tpu) echo "$ACCEL" ;;
            *) die "unknown ACCEL '$ACCEL'; choose cpu, cuda12, cuda13 or tpu" ;;
        esac
    elif [ "$SYSTEM" = 1 ]; then
        echo cpu # no extra: the machine's own jax brings its own plugin
    elif [ "$(uname -s)" = Linux ] && command -v nvidia-smi >/dev/null && nvidia_build
    then :
    elif has_tpu; then
        echo tpu
    else
        echo cpu
    fi
}

check_python() {
    python=${PYTHON:-python3}
    command -v "$python" >/dev/null ||
        die "no '$python' here; name an interpreter of 3.11 or newer: make PYTHON=..."
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') ||
        die "'$python' does not run"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$python is Python $version; 3.11 or newer is needed: make PYTHON=python3.12"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "Python $version has no venv module" \
            "(Debian, Ubuntu: apt install python$version-venv)"
}

check_wheels() {
    [ -d "$WHEELS" ] || die "WHEELS: no folder '$WHEELS'"
    ls "$WHEELS"/*.whl >/dev/null 2>&1 ||
        die "WHEELS: no wheel in '$WHEELS'; fill it with: make wheels WHEELS=$WHEELS"
}

requirement() { # the project with its extras, as pip wants it
    list=$(echo $EXTRAS | tr ' ' ',')
    [ "$accel" = cpu ] || list="$accel${list:+,$list}"
    echo ".${list:+[$list]}"
}

download_wheels() {
    [ -n "$WHEELS" ] || die "say where to: make wheels WHEELS=folder"
    check_python
    accel=$(detect)
    mkdir -p "$WHEELS"
    helper=$(mktemp -d)
    trap 'rm -rf "$helper"' EXIT
    "$python" -m venv "$helper"
    # hatchling and editables build the project itself: pip wants them as wheels too.
    "$helper/bin/python" -m pip download --disable-pip-version-check --prefer-binary \
        --dest "$WHEELS" "$(requirement)" "hatchling>=1.26" "editables>=0.5"
    rm -f "$WHEELS"/offrl_jax-* "$WHEELS"/offrl-jax-* # pip keeps one of the project
    for archive in "$WHEELS"/*.tar.gz "$WHEELS"/*.zip; do # where there is no wheel
        [ -e "$archive" ] || continue
        "$helper/bin/python" -m pip wheel --disable-pip-version-check --no-deps \
            --wheel-dir "$WHEELS" "$archive"
        rm -f "$archive"
    done
    note "$(find "$WHEELS" -name '*.whl' | wc -l | tr -d ' ') wheels ($accel) in $WHEELS"
}

checksum() { cksum <pyproject.toml | tr ' ' -; }
place() { echo "place=$(pwd | cksum | tr ' ' -)"; }
version_of() { "$1" -c 'import sys; print("python=%d.%d" % sys.version_info[:2])'; }
has() { case " $have " in *" $1 "*) ;; *) return 1 ;; esac; }

# Whether .venv was built here (its scripts hold its path), and with what was asked for
# by name (SYSTEM, PYTHON).
same_base() {
    has "$(place)" || return 1
    [ -z "$SYSTEM" ] || has "system=$SYSTEM" || return 1
    [ -z "$PYTHON" ] || has "$(version_of "$PYTHON")"
}

is_installed() {
    [ -n "$have" ] && [ -x $VENV/bin/python ] && [ ! -e $busy ] && same_base || return 1
    for word in "$(checksum)" $EXTRAS; do
        has "$word" || return 1
    done
    # A folder shared with a machine that has an accelerator serves one without, too.
    [ "$accel" = cpu ] || has "$accel"
}

must_start_anew() {
    [ -e $VENV ] || return 1
    [ ! -e $busy ] && [ -x $VENV/bin/python ] || return 0
    $VENV/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null || return 0
    [ -n "$have" ] || return 1 # made by hand: complete it
    same_base || return 0
    for word in cuda12 cuda13 tpu; do # two jax plugins in one environment fight
        if has $word && [ "$accel" != cpu ] && [ "$accel" != $word ]; then return 0; fi
    done
    return 1
}

make_venv() {
    if [ "$SYSTEM" != 1 ]; then
        "$python" -m venv $VENV
        return
    fi
    "$python" -m venv --system-site-packages $VENV
    # Where PYTHON is itself of a virtual environment, the line above gives its parent's
    # packages, not its own: a .pth file adds those.
    "$python" - "$($VENV/bin/python -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'EOF'
import pathlib, sys, sysconfig
if sys.prefix != sys.base_prefix:
    own = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    pathlib.Path(sys.argv[1], "_system.pth").write_text("\n".join(own) + "\n")
EOF
}

install() {
    if [ -f $busy ]; then
        other=$(cat $busy)
        if [ -n "$other" ] && kill -0 "$other" 2>/dev/null; then
            die "another install (process $other) is at work in $VENV; wait for it"
        fi
        note "an install into $VENV was interrupted; starting anew"
    fi
    [ -z "$WHEELS" ] || check_wheels
    if [ ! -e $VENV ] || must_start_anew; then
        check_python
        if [ "$SYSTEM" = 1 ]; then
            "$python" -c 'import jax' 2>/dev/null ||
                die "SYSTEM=1, but $python cannot import jax; without it one is installed"
        fi
        rm -rf $VENV
        have=""
    fi
    for word in cuda12 cuda13 tpu; do # keep an accelerator's jax up to date with the rest
        if has $word; then accel=$word; fi
    done
    mkdir -p $VENV
    echo $$ >$busy
    rm -f $stamp
    [ -x $VENV/bin/python ] || make_venv
    set -- --disable-pip-version-check
    [ -z "$WHEELS" ] || set -- "$@" --no-index --find-links "$WHEELS"
    if [ "$SYSTEM" = 1 ]; then
        # Held as they are, jax and its plugins; pip says so if something needs another.
        $VENV/bin/python -m pip list --format freeze 2>/dev/null |
            grep -E '^(jax|jaxlib|jax-[a-z0-9-]*|libtpu|numpy)==' >$VENV/held.txt
        set -- "$@" --constraint $VENV/held.txt
    fi
    note "offrl_jax ($accel) into $VENV; the first time takes minutes"
    $VENV/bin/python -m pip install "$@" --editable "$(requirement)" ||
        die "pip failed (its own words are above); the same command tries again"
    set -- "$(checksum)" "$(place)" "$(version_of $VENV/bin/python)"
    echo "$* system=${SYSTEM:-0} $accel $EXTRAS" >$stamp
    rm -f $busy
}

have=""
case ${1:-} in
    --detect) detect ;;
    --wheels) download_wheels ;;
    '')
        if [ -f $stamp ]; then read -r have <$stamp || have=""; fi
        if [ -z "$SYSTEM" ] && has system=1; then SYSTEM=1; fi
        accel=$(detect)
        is_installed || install
        ;;
    *) die "unknown option '$1'; see the head of tools/install.sh" ;;
esac
