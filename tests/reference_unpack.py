"""What a packed program unpacks itself with, readable. train_gpt.py holds the same, minified, as UNPACK.

    python tests/reference_unpack.py     prints it as it stands there

A test compares both. Change this one, then put what it prints into train_gpt.py.
"""
from array import array


def predict(code, count):
    """-> `count` bytes. Each bit is code(chance of a 1, in 65536): given when packing, decoded when unpacking.

    A mixture of contexts, after lpaq (Mahoney, mattmahoney.net/dc). In each of 8 contexts every bit has a history, its
    last 11 values there; `logits` says what a history makes likely. The prediction is the logits' sum with weights from
    three sets, chosen by how long a context is known, by the place in the byte, and by the punctuation before it.
    Logits and weights follow the gradient of the nats. Floats are added, multiplied and divided, no more: functions
    such as exp differ in the last bit between processors.
    """
    histories, logits, chances, odds = array("H", b"\1\0" * (2**24 + 256)), [0, 0], [], 2980.957987  # e^8
    for history in range(2, 4096):  # a 1, then the bits
        logits.append(logits[history // 2] * 0.7 + (history % 2 - 0.5) * 1.7)
    for _ in range(2048):  # of logits from -8 in steps of 1 / 128
        chances.append(int(65536 / (1 + odds)))
        odds *= 0.9922179382602435  # e^(-1/128)
    weights = [[0.055] * 8 for _ in range(9472)]
    data, recent, word, shape, brackets = b"", 0, 0, 0, [0]
    while len(data) < count:
        last, node = recent % 256, 1  # node: a 1, then the byte's bits so far
        keys = [(context * 8 + i) * 2654435769 % 16777213 for i, context in enumerate((
            last, recent % 65536, recent % 2**24, recent, word, shape % 4096, shape, brackets[-1] * 256 + last))]
        while node < 256:
            places = [key + node for key in keys]
            states = [histories[place] for place in places]
            inputs = [logits[state] for state in states]
            first = weights[256 + ((states[0] > 1) + (states[1] > 1) + (states[2] > 1)) * 256 + last]
            second, third, total = weights[node], weights[1280 + shape % 32 * 256 + node], 0
            for a, b, c, x in zip(first, second, third, inputs):
                total += (a + b + c) * x
            chance = chances[max(0, min(2047, int(total * 128) + 1024))]
            bit = code(chance)
            error, i = bit - chance / 65536, 0
            for place, state, x in zip(places, states, inputs):
                logits[state] += 0.15 * error * (first[i] + second[i] + third[i])
                x *= 0.002 * error
                first[i] += x
                second[i] += x
                third[i] += x
                state += state + bit
                histories[place] = state if state < 4096 else state % 2048 + 2048
                i += 1  # noqa: SIM113
            node += node + bit
        last = node - 256
        data += bytes([last])
        recent = recent % 2**32 * 256 + last
        if last > 126 or data[-1:].isalnum():
            shape = shape if word else shape * 4 + 1
            word = (word + last + 1) * 2654435769 % 2**32
        else:
            if last in b"([{":
                brackets = [*brackets, word * 31 + last]
            if last in b")]}":
                brackets = brackets[:-1] or [0]
            if last == 10:
                brackets = [0]
            shape, word = shape * 32 + last % 32, 0
        shape %= 2**18
    return data


def unpack(digits, count):
    """Digits + 1 of a number in base 253, the number of bytes in it -> text. The number is an arithmetic code of them.

    The first line holds the words for which the bytes from 128 on stand.
    """
    interval, digits = [0, 1], iter(digits)  # the number's place in it, its size

    def decode(chance):
        value, size = interval
        while size < 2**32:
            value, size = value * 253 + next(digits) - 1, size * 253
        part = (size >> 16) * chance
        interval[:] = (value, part) if value < part else (value - part, size - part)
        return value < part
    words, _, text = predict(decode, count).decode("latin1").partition("\n")
    for code, word in enumerate(words.split(), 128):
        text = text.replace(chr(code), word)
    return text


if __name__ == "__main__":
    import sys
    from pathlib import Path
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import train_gpt
    text = train_gpt.minify(Path(__file__).read_bytes().partition(b"\n\nif __name__")[0])
    escaped, lines = text.replace("\\", "\\\\").replace("\n", "\\n"), []
    while escaped:  # no escape is cut
        end = 107 - len(escaped[:107]) + len(escaped[:107].rstrip("\\"))
        lines.append(f'"{escaped[:end]}"')
        escaped = escaped[end:]
    print("UNPACK = (" + "\n          ".join(lines) + ")")
