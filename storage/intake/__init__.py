"""How pairs enter the lake: URL lists through img2dataset, and captioned image folders."""
