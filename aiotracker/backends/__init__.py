"""The stores. None of these modules imports another tracker's, and none holds a rule about tasks."""
