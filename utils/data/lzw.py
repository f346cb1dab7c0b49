"""How many bytes the LZW data of a TIFF stand for (TIFF 6.0, section 13): the one thing in them that can be checked.

libtiff stops at the length it expects, and OpenCV takes whatever it got; LZW has no checksum.
"""
import numpy as np

CLEAR, END, FIRST = 256, 257, 258  # two codes that stand for no bytes; the first entry that the data themselves make
# Of the codes after a CLEAR, how many are known when each is read, and so its width in bits, and where it begins.
_WIDTHS = 9 + np.searchsorted([511, 1023, 2047], np.arange(FIRST - 1, 4096), "right")
_STARTS = np.concatenate([[0], _WIDTHS.cumsum()])


def lzw_length(content: bytes) -> int:
    """Return the length in bytes of what a strip or tile decodes to; raises ValueError where a code is not known yet.

    A damaged code stands, as a rule, for another number of bytes: then so does all that is built on it. One that
    stands for as many is not found out.
    """
    data = np.frombuffer(content + bytes(2), np.uint8).astype(np.uint32)
    words = data[:-2] << 16 | data[1:-1] << 8 | data[2:]  # 24 bits from each byte on; a code has 12 at most
    position, total = 0, 0  # in bits; in bytes
    while True:
        count = np.searchsorted(position + _STARTS[1:], 8 * len(content), "right")  # of codes that are there in full
        starts, widths = position + _STARTS[:count], _WIDTHS[:count]
        codes = words[starts >> 3] >> (24 - widths - (starts & 7)) & (1 << widths) - 1
        ends = np.flatnonzero((codes == CLEAR) | (codes == END))
        used = ends[0] if len(ends) else count
        lengths = [1] * CLEAR + [0] * (FIRST - CLEAR)  # of what each code stands for
        try:
            for code in codes[:used].tolist():
                lengths.append(lengths[code] + 1)  # what it stands for, and the first byte of the next
        except IndexError:
            raise ValueError("an LZW code of it is not known yet") from None
        total += sum(lengths) - CLEAR - int(used)
        if not len(ends) or codes[used] == END:
            return total
        position += _STARTS[used + 1]
