"""The entropy layer: integers to nearly as few bits as their statistics allow, and back.

Everything goes through one asymmetric-numeral-systems coder (Duda 2013, arXiv 1311.2540, as
implemented by ``constriction``). Probabilities are integers that sum to 2**24, made by integer
arithmetic alone, so that both ends agree bit for bit on any machine. Tables of probabilities
travel inside the stream, as rounded logarithms of the counts.

A decoder reads whatever it is given: each read is bounded by what the caller expects, garbage
decodes to values within those bounds, and `Decoder.finish` refuses a stream that does not end
exactly where its last value does.
"""
