"""espeak-ng through ctypes: one utterance in, 16-bit samples out.

The engine keeps state in static variables that no call resets (the phase of
its pitch flutter, for one), so that what it says depends on what it said
before; `espeak_Terminate` followed by `espeak_Initialize` does not help.
Here every utterance is spoken by a freshly loaded copy of the library, which
starts from its initial data: the same text and voice give the same samples,
whatever came before, in any process, and the engines of other packages in
the same process are left alone. The price is one to two milliseconds for an
utterance, and about 2.5 kB that espeak-ng itself does not give back: a
million utterances are better written to disk than spoken anew each epoch.
"""

import _ctypes
import contextlib
import ctypes
import locale
import os
import shutil
import sys
import tempfile
import threading

import numpy as np

from speechbrain_taskarith.utils.optional import require

# espeak-ng's only output rate for its own (not MBROLA) voices, in Hz.
ENGINE_RATE = 22050

# Constants of espeak-ng's speak_lib.h.
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_INITIALIZE_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_POSITION_CHARACTER = 1
_RATE, _PITCH, _RANGE, _WORDGAP = 1, 3, 4, 7

# Milliseconds per callback. Part of what makes the samples what they are,
# hence a constant.
_BUFFER_MS = 60
# The engine keeps its data path in 160 characters.
_LONGEST_DATA_PATH = 120
_SEED = 1

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)

# The engine is not thread-safe, and a fork in the middle of an utterance
# would leave a half-done one in the child: both wait for this lock.
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_lock.acquire,
        after_in_parent=_lock.release,
        after_in_child=_lock.release,
    )

_image_descriptor = None


def loader():
    """Return the package `espeakng_loader`, or say how to get it."""
    return require("espeakng_loader", "synthesis", "speech synthesis")


def data_folder():
    """Return the absolute path of espeak-ng's voices and dictionaries."""
    return os.path.abspath(loader().get_data_path())


def speak(voice, text, *, rate, pitch, pitch_range, word_gap):
    """Speak one text with a fresh engine.

    `voice` is an identifier with or without a variant, `"gmw/en-US+f3"`; the
    other values are as in `EspeakVoice`. Returns int16 samples [T] at
    `ENGINE_RATE`.
    """
    values = rate, pitch, pitch_range, word_gap
    parameters = dict(zip((_RATE, _PITCH, _RANGE, _WORDGAP), values))
    with _lock:
        # The engine sets the process's character type to UTF-8 for itself.
        ctype = locale.setlocale(locale.LC_CTYPE)
        library = _load()
        try:
            return _speak(library, voice, text, parameters)
        finally:
            _unload(library)
            locale.setlocale(locale.LC_CTYPE, ctype)


def _speak(library, voice, text, parameters):
    chunks, faults = [], []

    def collect(samples, count, events):
        # An exception cannot cross the C code: carry it around, and answer
        # 1, which stops the engine.
        try:
            if samples and count > 0:
                chunks.append(ctypes.string_at(samples, 2 * count))
            return 0
        except BaseException as fault:
            faults.append(fault)
            return 1

    callback = _CALLBACK(collect)
    folder, descriptor = _short_path(data_folder())
    try:
        found = library.espeak_Initialize(
            _AUDIO_OUTPUT_SYNCHRONOUS,
            _BUFFER_MS,
            os.fsencode(folder),
            _INITIALIZE_DONT_EXIT,
        )
        if found != ENGINE_RATE:
            raise RuntimeError(
                f"espeak-ng did not start with its data in {data_folder()} "
                f"(answer {found}, expected {ENGINE_RATE}). Install it "
                "again: pip install --force-reinstall espeakng-loader"
            )
        try:
            library.espeak_SetSynthCallback(callback)
            with _seeded(library):
                status = library.espeak_SetVoiceByName(voice.encode())
                _check(status, f"to take the voice {voice!r}")
                for parameter, value in parameters.items():
                    status = library.espeak_SetParameter(parameter, value, 0)
                    _check(status, f"to set parameter {parameter} to {value}")
                data = text.encode("utf-8")
                size = ctypes.c_size_t(len(data) + 1)
                place = 0, _POSITION_CHARACTER, 0, _CHARS_UTF8
                status = library.espeak_Synth(data, size, *place, None, None)
                if faults:
                    raise faults[0]
                _check(status, f"to say {text!r}")
        finally:
            library.espeak_Terminate()
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return np.frombuffer(b"".join(chunks), dtype=np.int16)


def _check(status, what):
    if status != 0:
        raise RuntimeError(f"espeak-ng refused {what} (status {status})")


@contextlib.contextmanager
def _seeded(library):
    """Fix the random numbers behind breath, whisper and creak.

    Most voices draw from the library's own generator; a few (those that use
    the SpeechPlayer back end) from the C library's, whose state is put back
    afterwards where the C library can do so.
    """

    library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
    libc = None if sys.platform == "win32" else ctypes.CDLL(None)
    if not sys.platform.startswith("linux"):
        if libc is not None:
            libc.srand(_SEED)
        yield
        return
    # In glibc rand() is random(), and its state can be exchanged.
    libc.initstate.restype = libc.setstate.restype = ctypes.c_void_p
    buffer = ctypes.create_string_buffer(128)
    state = libc.initstate(_SEED, buffer, 128)
    try:
        yield
    finally:
        libc.setstate(ctypes.c_void_p(state))


def _load():
    """Load a copy of the library that nobody else has loaded."""
    global _image_descriptor
    path = loader().get_library_path()
    if hasattr(os, "memfd_create"):
        try:
            if _image_descriptor is None:
                descriptor = os.memfd_create("espeak-ng")
                with (
                    open(path, "rb") as stream,
                    open(descriptor, "wb", closefd=False) as image,
                ):
                    shutil.copyfileobj(stream, image)
                _image_descriptor = descriptor
            return ctypes.CDLL(f"/proc/self/fd/{_image_descriptor}")
        except OSError:
            # No /proc, or a policy against running from memory, or somebody
            # closed all descriptors: an ordinary file will do.
            _image_descriptor = None
    descriptor, copy = tempfile.mkstemp(suffix=os.path.splitext(path)[1])
    os.close(descriptor)
    try:
        shutil.copyfile(path, copy)
        return ctypes.CDLL(copy)
    finally:
        if sys.platform != "win32":
            os.unlink(copy)


def _unload(library):
    if hasattr(_ctypes, "dlclose"):
        _ctypes.dlclose(library._handle)
    else:
        _ctypes.FreeLibrary(library._handle)
        if os.path.dirname(library._name) == tempfile.gettempdir():
            os.unlink(library._name)


def _short_path(folder):
    """Return a path that fits into the engine, and what to close after."""
    if len(os.fsencode(folder)) <= _LONGEST_DATA_PATH:
        return folder, None
    if os.path.isdir("/proc/self/fd"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        return f"/proc/self/fd/{descriptor}", descriptor
    raise RuntimeError(
        f"{folder}: espeak-ng cannot use a data folder with a path of more "
        f"than {_LONGEST_DATA_PATH} bytes. Install into an environment with "
        "a shorter path."
    )
