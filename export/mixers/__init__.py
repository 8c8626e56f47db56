"""What a layer computes, a file each: a function of the graph, x [b, s, hidden] and the layer's number."""
